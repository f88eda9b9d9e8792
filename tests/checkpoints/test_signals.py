"""A run that a signal stops is saved after the step under way, and goes on from there to the bit; real signals, own process."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from grit_lightning.callbacks import StopOnSignal
from grit_lightning.runs.signals import StoppedBySignal


class Signals(pl.Callback):
    """Sends signals to this process at one moment of a run."""

    def __init__(self, hook: str, step: int, *signums: int) -> None:
        self.step, self.signums, self.sent = step, signums, False
        setattr(self, hook, self._send)

    def _send(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.sent and not trainer.sanity_checking:
            self.sent = True
            for signum in self.signums:
                signal.raise_signal(signum)


def stop(run: Any, name: str, hook: str, step: int, *signums: int, **settings: Any) -> int:
    """Train until a signal stops the run; return its exit code."""
    with pytest.raises(StoppedBySignal) as stopped:
        run(name, StopOnSignal(), Signals(hook, step, *signums), every_n_steps=100, **settings)
    return int(stopped.value.code)


VALIDATING = {"limit_val_batches": 1.0, "val_check_interval": 4}
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "in a step": ("on_before_optimizer_step", 3, 4, {}),
    "in the last step": ("on_before_optimizer_step", 11, 12, {}),
    "in a step before a validation": ("on_before_optimizer_step", 4, 5, {"limit_val_batches": 1.0}),
    "in a validation": ("on_validation_batch_start", 4, 4, VALIDATING),
    "in a validation at an epoch's end": ("on_validation_batch_end", 5, 5, {"limit_val_batches": 1.0, "max_epochs": 3}),
    "in the last validation, with workers": ("on_validation_batch_start", 12, 12, VALIDATING | {"workers": 1}),
}
"""By moment: the hook and the step in which the signal comes, the step that is saved, and settings of the run."""


@pytest.mark.parametrize("moment", CASES)
def test_a_stopped_run_goes_on_bit_for_bit(run: Any, whole: Path, moment: str) -> None:
    hook, step, saved, settings = CASES[moment]
    if settings:
        whole = run("whole", every_n_steps=100, **settings)
    assert stop(run, "stopped", hook, step, signal.SIGTERM, **settings) == 143
    folder = run.folder / "stopped"
    assert run.content(folder)["global_step"] == saved
    resumed = run("stopped", resume=run.last(folder), every_n_steps=100, **settings)
    run.assert_same(whole, resumed)
