"""A change of the weights after the last step: before anything measures or saves the result, and what was before it stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint

from grit_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from grit_lightning.callbacks.forgetting import ForgettingProbe
from grit_lightning.runs.writing import is_dev_run

UNEDITED, RETAINED = "unedited.ckpt", "retained.ckpt"


def put_before_probes(trainer: pl.Trainer, editor: Callback) -> None:
    """Have what a callback does when training ends come before every measurement of what has been forgotten."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside the Trainer's __init__
    others = [callback for callback in callbacks if callback is not editor]
    first = next((i for i, other in enumerate(others) if isinstance(other, ForgettingProbe | Checkpoint)), len(others))
    place = min(callbacks.index(editor), first)
    trainer.callbacks = [*others[:place], editor, *others[place:]]  # type: ignore[attr-defined]  # as above


def save_around(trainer: pl.Trainer, edit: Callable[[], None]) -> Path | None:
    """Save the run as it is, edit, and save it again; every process must call it.

    The edited step replaces that of an `AdapterCheckpoint`; where there is none, it goes to `retained.ckpt`. A run that writes
    no checkpoints is only edited.

    Args:
        trainer: At the end of its training.
        edit: Changes the weights.

    Returns:
        The checkpoint from before the edit; None if there is none.
    """
    folder = _checkpoint_folder(trainer)
    if folder is None:
        edit()
        return None
    saver = next((saver for saver in trainer.checkpoint_callbacks if isinstance(saver, AdapterCheckpoint)), None)
    if saver is None:
        trainer.save_checkpoint(folder / UNEDITED)
        edit()
        trainer.save_checkpoint(folder / RETAINED)
    else:
        saver.keep_copy(trainer, UNEDITED)  # of the end of the step, from which a run goes on as if it had not ended
        edit()
        saver.save_again(trainer)
    return folder / UNEDITED


def _checkpoint_folder(trainer: pl.Trainer) -> Path | None:
    """Return where this run's checkpoints go, an `AdapterCheckpoint`'s first; None if it writes none."""
    if trainer.barebones or is_dev_run(trainer) or not trainer.checkpoint_callbacks:
        return None
    savers = sorted(trainer.checkpoint_callbacks, key=lambda saver: not isinstance(saver, AdapterCheckpoint))
    folders = [saver.dirpath for saver in savers if isinstance(saver, ModelCheckpoint) and saver.dirpath]
    return Path(folders[0]) if folders else Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
