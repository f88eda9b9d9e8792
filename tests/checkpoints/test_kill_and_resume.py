"""The benchmark that kills real processes, with three kills instead of twenty."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_and_resume.py"


def test_killed_and_resumed_runs_differ_in_no_bit_from_untouched_ones() -> None:
    command = [sys.executable, str(SCRIPT), "--times=3", "--steps=12", "--seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = [line for line in done.stdout.splitlines() if line.startswith("kill ")]
    assert len(kills) == 3
    assert all(line.endswith("differing bits 0, lines 0") for line in kills)
    assert "3 kills: nothing differs" in done.stdout
