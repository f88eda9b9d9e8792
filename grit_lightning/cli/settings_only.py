"""The settings of `grit fit`, read and built, with nothing run: for commands that say something about a run beforehand."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.optim import Optimizer

from grit_lightning.callbacks.run_length import RunLength
from grit_lightning.cli.processes import OneOfSeveral, configured_processes
from grit_lightning.cli.run import GritCLI
from grit_lightning.errors import InvalidValueError
from grit_lightning.optimization import planned_steps

SETS_THE_LENGTH: tuple[type[Callback], ...] = (GradientAccumulationScheduler, RunLength)
"""Callbacks that a run's number of optimizer steps depends on."""
WRITES_NOTHING: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "profiler": None,
    "barebones": False,
}
"""Arguments of a Trainer that leaves no file."""


class SettingsCLI(GritCLI):
    """What `grit fit` would build from the same words: model and data, no run folder, and a Trainer that only counts.

    Neither weights nor rows are read yet. The Trainer is on the CPU and stands for the first of the run's processes, so that a
    run on eight GPUs can be planned on a machine without any.

    Args:
        words: Words of `grit fit`, as `settle` returns them.
        processes: Number of processes of the run; None for what the settings say.

    Attributes:
        model: The module, without its model.
        datamodule: The data module, not set up.
        trainer: A Trainer with the run's length and precision.
        trainer_settings: Arguments of the Trainer that the run would have.
        processes: Number of processes of the run.
    """

    trainer_settings: dict[str, Any]

    def __init__(self, words: Sequence[str], processes: int | None = None) -> None:
        """Parse and build."""
        self.processes = processes
        super().__init__(["fit", *words])

    def before_instantiate_classes(self) -> None:
        """Settle what the words leave open, but for the run folder."""
        self._name_once()
        self._leave_out_what_is_unused()

    def after_instantiate_classes(self) -> None:
        """Leave all files as they are."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build a Trainer that writes nothing, with those callbacks only that the length of the run depends on."""
        given = self.trainer_settings = dict(self.config_init["fit"].trainer)
        if self.processes is None:
            self.processes = configured_processes(given)
        configured = given["callbacks"] or []
        callbacks = configured if isinstance(configured, list) else [configured]
        kept = [callback for callback in callbacks if isinstance(callback, SETS_THE_LENGTH)]
        one_of_them = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": OneOfSeveral(self.processes)}
        try:
            with quietly():
                return Trainer(**{**given, **WRITES_NOTHING, **one_of_them, "callbacks": kept})
        except (TypeError, ValueError) as error:
            raise InvalidValueError(f"trainer: {error}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing: that is for `grit fit`."""

    def count_steps(self) -> int | None:
        """Set the data up as the run would, and return the run's number of optimizer steps; None if nothing limits it.

        Lightning itself counts: it begins a fit of a module with one number to train, which ends before the first batch.
        """
        counter = _StepCounter()
        with quietly(), suppress(_CountedError):
            self.trainer.fit(counter, datamodule=self.datamodule)
        return counter.steps


class _CountedError(Exception):
    """The steps are counted, there is nothing else to do."""


class _StepCounter(LightningModule):
    """Takes the place of the model in a fit, and ends it as soon as the number of steps is known."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: int | None = None
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Never runs; without it Lightning does not begin a fit."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Never runs; without it Lightning would say that validation is left out."""

    def configure_optimizers(self) -> Optimizer:
        """Count the steps at the time when a real module would."""
        self.steps = planned_steps(self.trainer)
        raise _CountedError


@contextmanager
def quietly() -> Iterator[None]:
    """Keep back what Lightning says about devices and loaders, which are not those of the run."""
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = messages.level
    messages.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            yield
    finally:
        messages.setLevel(level)
