"""How long a run is, where nothing says so: from the number of rows."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from grit_lightning.errors import require


@runtime_checkable
class HasTrainingBatches(Protocol):
    """A data module that knows the length of an epoch before the Trainer asks for its loader."""

    def training_batches(self) -> int:
        """Return the training batches of one epoch on this process."""


class RunLength(Callback):
    """Ends a run after some epochs, more where there are few rows, fewer where there are many.

    It acts on a Trainer that has no end of its own (`max_epochs: -1`, `max_steps: -1`); with either of them, it says that it
    does not. The number of optimizer steps depends on the rows alone, so that schedules and resumed runs agree on it. A run
    that `max_steps` ends within its first epoch is validated during the fit only where `trainer.val_check_interval` asks
    for it.

    Args:
        epochs: Passes over the training rows.
        min_steps: Optimizer steps to reach by further epochs, where these are fewer.
        max_epochs: Epochs that are not exceeded for the sake of `min_steps`.
        max_steps: Optimizer steps after which a run ends anyway; None for no such end.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, epochs: int = 3, min_steps: int = 100, max_epochs: int = 10, max_steps: int | None = 2_000
    ) -> None:
        """Check and remember the settings."""
        super().__init__()
        require("RunLength", "epochs", epochs >= 1, "an integer ≥ 1", epochs)
        require("RunLength", "min_steps", min_steps >= 1, "an integer ≥ 1 (optimizer steps)", min_steps)
        require("RunLength", "max_epochs", max_epochs >= epochs, f"an integer ≥ epochs ({epochs})", max_epochs)
        reached = max_steps is None or max_steps >= min_steps
        require("RunLength", "max_steps", reached, f"null or an integer ≥ min_steps ({min_steps})", max_steps)
        self.epochs = epochs
        self.min_steps = min_steps
        self.max_epochs = max_epochs
        self.max_steps = max_steps
        self._chosen: tuple[int | None, int] = (-1, -1)

    def plan(self, steps_an_epoch: int) -> tuple[int, int]:
        """Return epochs and optimizer steps of a run.

        Args:
            steps_an_epoch: Optimizer steps of one epoch.

        Example:
            >>> RunLength(epochs=3, min_steps=100, max_steps=2000).plan(20), RunLength().plan(5000)
            ((5, 100), (3, 2000))
        """
        enough = math.ceil(self.min_steps / steps_an_epoch)
        epochs = min(max(self.epochs, enough), self.max_epochs)
        steps = epochs * steps_an_epoch
        return epochs, steps if self.max_steps is None else min(steps, self.max_steps)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tell the Trainer when the run ends; before the schedule of the learning rate is built.

        Raises:
            MisconfigurationException: If the data module does not know the length of an epoch.
        """
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside the Trainer's __init__
            return
        if (trainer.max_epochs, trainer.max_steps) not in ((-1, -1), self._chosen):  # the latter in a second fit
            rank_zero_info(
                f"RunLength: the Trainer has an end of its own (max_epochs {trainer.max_epochs}, max_steps "
                f"{trainer.max_steps}), which is kept."
            )
            return
        data = trainer.datamodule  # type: ignore[attr-defined]  # as above
        if not isinstance(data, HasTrainingBatches):
            raise MisconfigurationException(
                "RunLength: expected a data module that knows how many training batches an epoch has (`training_batches`), got "
                f"{type(data).__name__}. Set trainer.max_epochs or trainer.max_steps, or remove the callback."
            )
        limit, batches = trainer.limit_train_batches, data.training_batches()
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        epochs, steps = self.plan(max(1, math.ceil(batches / trainer.accumulate_grad_batches)))
        trainer.fit_loop.max_epochs = epochs
        trainer.fit_loop.epoch_loop.max_steps = steps
        self._chosen = (epochs, steps)
        rank_zero_info(f"RunLength: {steps:,} optimizer steps, {epochs} epochs of {batches:,} batches on each process.")
