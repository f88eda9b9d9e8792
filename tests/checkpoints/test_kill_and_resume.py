"""The benchmark that kills real processes, with three kills instead of twenty: in a step with either optimizer, in a write."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_killed_and_resumed_runs_differ_in_no_bit_from_untouched_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("kill_and_resume")  # here, where all that it imports is loaded already
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # it sets them: afterwards they are as they were
    monkeypatch.setattr(sys, "argv", ["kill_and_resume.py", "--times=3", "--steps=12", "--seed=1"])
    code = benchmark.main()
    printed = capsys.readouterr().out
    assert code == 0, printed
    kills = [line for line in printed.splitlines() if line.startswith("kill ")]
    assert len(kills) == 3
    assert [line.split()[2] for line in kills] == ["AdamW", "EigenbasisAdam", "AdamW"]
    assert all(line.endswith("differing bits 0, lines 0") for line in kills)
    assert "3 kills: nothing differs" in printed
