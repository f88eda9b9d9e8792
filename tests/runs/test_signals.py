"""Signals are noted, not obeyed; a second Ctrl-C ends the process; afterwards everything is as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from grit_lightning.runs import signals
from grit_lightning.runs.requeue import requeue, requeue_signal
from grit_lightning.runs.signals import StoppedBySignal, StopSignals


def test_the_first_signal_is_noted_and_the_handlers_of_before_come_back() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    noted = StopSignals(extra=signal.SIGUSR1)
    noted.install()
    try:
        assert noted.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert noted.received == signal.SIGUSR1
    finally:
        noted.restore()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    noted.restore()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_outside_the_main_thread_nothing_is_taken_over() -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=StopSignals().install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    program = f"""
import importlib.util, os, signal
spec = importlib.util.spec_from_file_location("signals", {signals.__file__!r})
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
signals.StopSignals().install()
os.kill(os.getpid(), signal.SIGINT)
print("still there", flush=True)
os.kill(os.getpid(), signal.SIGINT)
print("not reached")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGINT, "still there\n")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_is_the_one_that_shells_expect(signum: signal.Signals, code: int) -> None:
    stop = StoppedBySignal(signum)
    assert (stop.code, str(stop)) == (code, signum.name)


def test_slurm_is_asked_only_where_it_is_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert requeue_signal(None) is None
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    assert requeue_signal(None) == signal.SIGUSR1
    assert requeue_signal(object()) is None

    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "could not be put back" in requeue()
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path / 'asked'}\n")
    scontrol.chmod(0o755)
    assert "job 42 is back in the queue" in requeue()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue()
    assert (tmp_path / "asked").read_text() == "requeue 42\nrequeue 7_3\n"
