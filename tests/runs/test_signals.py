"""Data-loader workers leave signals to the main process, and end a little after SIGTERM."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, signal, time
from grit_lightning.runs import signals
signals.WORKERS_PATIENCE = 1
signals.ignore_signals()
for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGTERM"):
    os.kill(os.getpid(), getattr(signal, name))
print("still there", flush=True)
signal.pause()
"""


def test_a_worker_goes_on_for_a_while_and_then_ends() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.stdout, -ended.returncode) == ("still there\n", 14)  # SIGALRM
