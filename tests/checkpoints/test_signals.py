"""A run that a signal stops: the step under way ends, is saved, and the resumed run differs in no bit from one that went on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

Runs = Any


class Ask(pl.Callback):
    """Sends a signal to this process at the start of a micro-batch or in the middle of a validation."""

    def __init__(self, signum: signal.Signals, step: int, in_validation: bool = False) -> None:
        self.signum, self.step, self.in_validation = signum, step, in_validation

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._ask(trainer, not self.in_validation)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._ask(trainer, self.in_validation)

    def _ask(self, trainer: pl.Trainer, here: bool) -> None:
        if here and trainer.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), self.signum)


@pytest.mark.parametrize(
    ("ask", "settings", "stops_at"),
    [
        (lambda: Ask(signal.SIGTERM, 3), {}, 4),
        (lambda: Ask(signal.SIGINT, 7), {"workers": 2}, 8),
        (lambda: Ask(signal.SIGTERM, 11), {}, 12),
    ],
    ids=["mid-epoch", "with loader processes", "last step"],
)
def test_stopped_and_resumed(
    ask: Callable[[], Ask], settings: dict[str, Any], stops_at: int, run: Runs, whole: Path, capsys: Any
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    stop = ask()
    with pytest.raises(SystemExit) as stopped:
        run("stopped", stop, every_n_steps=100, **settings)
    assert stopped.value.code == 128 + stop.signum
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    folder = run.folder / "stopped"
    last = run.last(folder)
    assert torch.load(last, weights_only=True)["global_step"] == stops_at
    said = capsys.readouterr().err
    assert f"Stopped by {stop.signum.name} after step {stops_at}, which is saved." in said
    assert f"ckpt_path={str(last)!r}" in said
    run("stopped", resume=last, **settings)
    run.assert_same(whole, folder)


@pytest.mark.parametrize("in_validation", [False, True])
def test_a_validation_that_follows_is_part_of_the_step(run: Runs, in_validation: bool) -> None:
    validated = {"limit_val_batches": 1.0, "val_check_interval": 4, "every_n_steps": 100}
    untouched = run("untouched", **validated)
    with pytest.raises(SystemExit):
        run("stopped", Ask(signal.SIGTERM, 2 if in_validation else 1, in_validation), **validated)
    stopped = run.folder / "stopped"
    assert torch.load(run.last(stopped), weights_only=True)["global_step"] == 2
    assert [line for line in run.lines(stopped) if "val/loss" in line]
    run("stopped", resume=run.last(stopped), **validated)
    run.assert_same(untouched, stopped)


def test_slurm_gets_its_job_back(run: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ > {tmp_path / 'asked'}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = {"JOB_ID": "42", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(SystemExit) as stopped:
        run("stopped", Ask(signal.SIGUSR1, 2), every_n_steps=100)
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert (tmp_path / "asked").read_text() == "requeue 42\n"
    assert "SLURM job 42 is back in the queue" in capsys.readouterr().err
    assert torch.load(run.last(run.folder / "stopped"), weights_only=True)["global_step"] == 3
