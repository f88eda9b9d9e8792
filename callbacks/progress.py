"""How far a run is: a bar in a terminal, lines where the output goes to a file or a pipe."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from grit_lightning.errors import require

Shown = dict[str, int | str | float | dict[str, float]]
_BATCHES_BETWEEN_LINES_IN_A_FILE = 100
_LINES_PER_EVALUATION = 4


def _with_loss_and_rank(items: Shown, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Shown:
    """Add what is shown of a training besides what the module logs for it."""
    items.pop("v_num", None)
    loss = trainer.callback_metrics.get("train/loss")
    if loss is not None:
        items.setdefault("train/loss", float(loss))
    geometry = getattr(pl_module, "geometry", None)
    if geometry is not None:
        items["rank"] = round(float(geometry.mean_rank), 1)
    return items


class GeometryProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the training loss and the mean effective rank of the adapter.

    Without a terminal (a log file, CI) it refreshes every 100 batches and at the end of an epoch instead of at every
    batch; `ProgressLines` is made for that.
    """

    def __init__(self, refresh_rate: int | None = None, process_position: int = 0, leave: bool = False) -> None:
        """Choose the refresh rate.

        Args:
            refresh_rate: Batches between updates; 0 disables the bar, None is 1 in a terminal and 100 elsewhere.
            process_position: Lines to leave above the bar.
            leave: Keep the finished bar of every epoch.
        """
        if refresh_rate is None:
            refresh_rate = 1 if sys.stdout.isatty() else _BATCHES_BETWEEN_LINES_IN_A_FILE
        super().__init__(refresh_rate, process_position, leave)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Shown:
        """Return what stands behind the bar: what the module logged for it, the loss and the mean rank."""
        return _with_loss_and_rank(super().get_metrics(trainer, pl_module), trainer, pl_module)


class ProgressLines(ProgressBar):
    """One plain line every few optimizer steps, with the loss and the mean effective rank, and four an evaluation."""

    def __init__(self, every_n_steps: int | None = None) -> None:
        """Choose how often.

        Args:
            every_n_steps: Optimizer steps between two lines; None for the Trainer's `log_every_n_steps`. The last step has
                a line in any case.

        Raises:
            ValueError: It is below 1.
        """
        super().__init__()
        require(
            "ProgressLines",
            "every_n_steps",
            every_n_steps is None or every_n_steps >= 1,
            "an integer ≥ 1",
            every_n_steps,
        )
        self.every_n_steps = every_n_steps
        self._enabled = True
        self._since = (0, 0.0)  # step and time of the line before
        self._last_step = 0

    def disable(self) -> None:
        """Say nothing, as on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Shown:
        """Return what a line shows: what the module logged for it, the loss and the mean rank."""
        return _with_loss_and_rank(super().get_metrics(trainer, pl_module), trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._last_step = trainer.global_step
        self._since = (trainer.global_step, time.perf_counter())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a line if this batch ended an optimizer step whose turn it is."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        if every and step % every == 0:
            self._write_step(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the line of the last step if it has none yet."""
        if self._since[0] != self._last_step:
            self._write_step(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write a line at every quarter."""
        if not trainer.sanity_checking:
            self._write_quarter(self.validation_description, batch_idx + 1, trainer.num_val_batches, dataloader_idx)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write a line at every quarter."""
        self._write_quarter(self.test_description, batch_idx + 1, trainer.num_test_batches, dataloader_idx)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write a line at every quarter."""
        self._write_quarter(self.predict_description, batch_idx + 1, trainer.num_predict_batches, dataloader_idx)

    def _write_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, now = self._last_step, time.perf_counter()
        before, then = self._since
        self._since = (step, now)
        of = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        shown = [
            f"{name} {value:.4g}" for name, value in self.get_metrics(trainer, pl_module).items() if _is_number(value)
        ]
        per_step = f"{(now - then) / (step - before):.2f} s a step"
        self._write(f"step {step}{of}, epoch {trainer.current_epoch}: {', '.join([*shown, per_step])}")

    def _write_quarter(self, description: str, done: int, totals: list[int | float], loader: int) -> None:
        total = totals[loader]
        if total == float("inf"):
            quarter_ended = done % _BATCHES_BETWEEN_LINES_IN_A_FILE == 0
        else:
            quarter_ended = done * _LINES_PER_EVALUATION // total > (done - 1) * _LINES_PER_EVALUATION // total
        if quarter_ended:
            self._write(f"{description}: {done}/{total} batches")

    def _write(self, line: str) -> None:
        if self._enabled:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()  # a pipe shows it now and not at the end


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
