"""A progress bar that shows the loss and the mean effective rank."""

from __future__ import annotations

import sys

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar

_BATCHES_BETWEEN_LINES_IN_A_FILE = 100


class GeometryProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the training loss and the mean effective rank of the adapter.

    Without a terminal (a log file, CI) it refreshes every 100 batches and at the end of an epoch instead of at every
    batch.
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

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands behind the bar: what the module logged for it, the loss and the mean rank."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            items.setdefault("train/loss", float(loss))
        geometry = getattr(pl_module, "geometry", None)
        if geometry is not None:
            items["rank"] = round(float(geometry.mean_rank), 1)
        return items
