"""The benchmark that stops real processes, a few instead of twenty: killed in a step or a write, or asked by a signal."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(("signum", "times", "more"), [("SIGKILL", 3, []), ("SIGTERM", 1, ["--every_n_steps=1000"])])
def test_stopped_and_resumed_runs_differ_in_no_bit_from_untouched_ones(
    signum: str, times: int, more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("kill_and_resume")  # here, where all that it imports is loaded already
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # it sets them: afterwards they are as they were
    monkeypatch.setattr(
        sys, "argv", ["kill_and_resume.py", f"--times={times}", "--steps=12", "--seed=1", f"--signal={signum}", *more]
    )
    code = benchmark.main()
    printed = capsys.readouterr().out
    assert code == 0, printed
    kills = [line for line in printed.splitlines() if line.startswith("kill ")]
    assert len(kills) == times
    assert [line.split()[2] for line in kills] == ["AdamW", "EigenbasisAdam", "AdamW"][:times]
    assert all(line.endswith("differing bits 0, lines 0") for line in kills)
    assert f"{times} kills: nothing differs" in printed
