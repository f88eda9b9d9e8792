"""Who writes into the folder of a run, and whether anybody does."""

from __future__ import annotations

import lightning.pytorch as pl


def is_dev_run(trainer: pl.Trainer) -> bool:
    """Return whether this is `fast_dev_run`, which tries everything and leaves nothing behind; the same on every process."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set outside the Trainer's __init__


def writes_files(trainer: pl.Trainer) -> bool:
    """Return whether this process writes: it is rank zero, and the Trainer is neither in `fast_dev_run` nor barebones."""
    return trainer.is_global_zero and not trainer.barebones and not is_dev_run(trainer)
