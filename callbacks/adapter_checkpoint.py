"""Checkpoints from which a run that was killed at any moment resumes as if it had never stopped."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from weakref import proxy

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from grit_lightning.checkpoints.atomic_io import make_atomic
from grit_lightning.checkpoints.reading import read_checkpoint
from grit_lightning.errors import require
from grit_lightning.runs.atomic import point_to, write_file
from grit_lightning.runs.metrics_log import JSONLinesLogger
from grit_lightning.runs.signals import slurm_job
from grit_lightning.runs.writing import is_dev_run

LOG_KEY = "grit_log"


class AdapterCheckpoint(ModelCheckpoint):
    """Saves every few optimizer steps, and after the last step of an epoch and of the run; `last.ckpt` links to the newest.

    It saves at the end of a step, after every other callback, and after the validation if one follows the step. A file gets
    its final name only when all of it is on disk, `last.ckpt` is moved in one rename, and only then is an older file removed:
    a run that is killed at any moment leaves a checkpoint to resume from. `Trainer.save_checkpoint` becomes atomic too.

    What the run logs is part of the checkpoint: Lightning writes the metrics of a step after the checkpoint of that step,
    and repeats values that are logged only now and then (ranks, say) at every later step of the epoch. On resume,
    `metrics.jsonl` is cut back to where it was, and gets exactly the lines that an uninterrupted run would have written.

    Args:
        dirpath: Folder of the checkpoints; None is `checkpoints/` in the run's folder.
        every_n_steps: Optimizer steps between two checkpoints.
        keep_last: How many of the newest to keep.

    Raises:
        ValueError: If a number is less than 1.
    """

    def __init__(self, dirpath: str | Path | None = None, every_n_steps: int = 50, keep_last: int = 1) -> None:
        """Check and remember the settings."""
        for name, value in (("every_n_steps", every_n_steps), ("keep_last", keep_last)):
            require("AdapterCheckpoint", name, value >= 1, "an integer ≥ 1", value)
        super().__init__(dirpath, save_top_k=0, every_n_train_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self._seen_step = 0
        self._saved_step = 0
        self._kept: list[str] = []
        self._waits_for_validation = False
        self._step_metrics: dict[str, Any] = {}
        self._resumed_log: dict[str, Any] | None = None

    # When to save.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the folder, and make this Trainer write every checkpoint atomically."""
        super().setup(trainer, pl_module, stage)
        make_atomic(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Avoid saving the step that the run resumes from a second time."""
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if this micro-batch has completed an optimizer step that is due."""
        step = trainer.global_step
        if step == self._seen_step or is_dev_run(trainer):
            return
        self._seen_step = step
        validates = validation_follows(trainer, batch_idx)
        if validates:
            self._step_metrics = _current_metrics(trainer)
        last = step == trainer.max_steps or trainer.is_last_batch or trainer.should_stop
        if not last and step % self.every_n_steps != 0:
            return
        if validates:
            self._waits_for_validation = True
        else:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the step that has just been validated, if it is due."""
        if self._waits_for_validation and trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing: the last step of the epoch has already been saved."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step of a run that was stopped between two due steps."""
        self.save_unless_saved(trainer)

    # Saving.

    def save_unless_saved(self, trainer: pl.Trainer) -> None:
        """Save this step, due or not; call it on all processes, at the end of a step."""
        if self._saved_step != trainer.global_step and not is_dev_run(trainer):
            self._save(trainer)

    def save_again(self, trainer: pl.Trainer) -> None:
        """Save this step anew, after a change of the weights that belongs to it; call it on all processes."""
        if not is_dev_run(trainer):
            self._save(trainer)

    def keep_copy(self, trainer: pl.Trainer, name: str) -> None:
        """Keep this step under another name too, from which nothing will remove it; call it on all processes."""
        self.save_unless_saved(trainer)
        folder = Path(str(self.dirpath))
        if trainer.is_global_zero and not is_dev_run(trainer):
            with (folder / self._kept[-1]).open("rb") as saved:
                write_file(folder / name, partial(shutil.copyfileobj, saved))
        trainer.strategy.barrier("AdapterCheckpoint")

    def _save(self, trainer: pl.Trainer) -> None:
        """Write, link, and only then remove old files. All processes take part."""
        folder = Path(str(self.dirpath))
        name = f"epoch={trainer.current_epoch}-step={trainer.global_step}{self.FILE_EXTENSION}"
        self._waits_for_validation = False
        self._saved_step = trainer.global_step
        self._kept = [*(kept for kept in self._kept if kept != name), name]
        self.best_model_path, self.last_model_path = str(folder / name), str(folder / f"last{self.FILE_EXTENSION}")
        # lists the older files too, in case this process ends here
        trainer.save_checkpoint(folder / name, weights_only=False)
        if trainer.is_global_zero:
            point_to(Path(self.last_model_path), name)
        trainer.strategy.barrier("AdapterCheckpoint")
        too_old, self._kept = self._kept[: -self.keep_last], self._kept[-self.keep_last :]
        for old in too_old:
            trainer.strategy.remove_checkpoint(folder / old)
        if trainer.is_global_zero:
            for each in trainer.loggers:
                each.after_save_checkpoint(proxy(self))

    @property
    def state_key(self) -> str:
        """A key without settings, so that a run may be resumed with another interval."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Return which files exist, and for which SLURM job they are written."""
        return {"saved_step": self._saved_step, "kept": list(self._kept), "slurm_job": slurm_job()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the files of the run that is resumed."""
        self._saved_step, self._kept = state_dict["saved_step"], list(state_dict["kept"])

    # What has been logged.

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the position in the log, and what Lightning will write next if it is not stopped."""
        if _inside_epoch(trainer):
            _count_epoch_as_begun(checkpoint)
        checkpoint[LOG_KEY] = {
            "marks": {logger.path.name: logger.mark() for logger in _json_loggers(trainer)},
            "metrics": self._step_metrics if trainer.validating else _current_metrics(trainer),
            "unwritten": _log_line_follows(trainer),
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state of the log for the start of the fit."""
        self._resumed_log = checkpoint.get(LOG_KEY)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On resume, restore the log to just after the step of the checkpoint."""
        log = self._resumed_log = None if trainer.ckpt_path is None else self._resumed_log
        if log is None:
            return
        for file in _json_loggers(trainer):
            if file.path.name in log["marks"]:
                file.rewind(log["marks"][file.path.name])
        if log["unwritten"] and log["metrics"]:
            for logger in trainer.loggers:
                logger.log_metrics({**log["metrics"], "epoch": log["epoch"]}, step=log["step"] - 1)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """On resume, give Lightning back the values that it repeats until the end of the epoch."""
        log, self._resumed_log = self._resumed_log, None
        if log is not None and log["metrics"] and batch_idx > 0 and trainer.current_epoch == log["epoch"]:
            pl_module.log_dict(log["metrics"], on_step=True, on_epoch=False, batch_size=1)


def left_by_this_slurm_job(folder: Path) -> Path | None:
    """Return the last checkpoint in a folder if this SLURM job has written it before it was requeued.

    A requeued job runs its command again, word for word, and must neither begin anew nor refuse the folder that it has filled.
    """
    last = folder / "last.ckpt"
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" or not last.exists():
        return None
    saved = read_checkpoint(last)["callbacks"].get(AdapterCheckpoint.__qualname__, {})
    return last if saved.get("slurm_job") == slurm_job() else None


def validation_follows(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether Lightning validates between this micro-batch and the next one, by its own rule."""
    every = trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every != 0):
        return False
    interval = trainer.val_check_batch
    if interval is None:  # by the clock, which cannot be known in advance
        return False
    if interval == float("inf"):
        return trainer.is_last_batch
    position = trainer.fit_loop.total_batch_idx if every is None else batch_idx
    return bool((position + 1) % interval == 0)


def _log_line_follows(trainer: pl.Trainer) -> bool:
    """Return whether Lightning is in a micro-batch that completes a step whose metrics it writes afterwards."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    if not trainer.training or not _inside_epoch(trainer):
        return False
    closes = progress.current.ready % trainer.accumulate_grad_batches == 0 or progress.is_last_batch
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside the Trainer's __init__
    return bool(closes and trainer.loggers and every and (trainer.global_step % every == 0 or trainer.should_stop))


def _inside_epoch(trainer: pl.Trainer) -> bool:
    """Return whether this is the end of a micro-batch, or the validation after it."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return trainer.validating or progress.processed != progress.completed


def _count_epoch_as_begun(checkpoint: dict[str, Any]) -> None:
    """Correct Lightning's count of epochs: after a resume from an epoch's last step, it does not count the next as begun.

    A checkpoint of that next epoch would then be mistaken for one between two epochs, and the epoch would run again.
    """
    for count in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        count["ready"] = count["started"] = count["processed"] + 1


def _current_metrics(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what Lightning would write for this step: values logged in it, or last logged earlier in the epoch."""
    logged = trainer.logged_metrics  # grows with everything that is logged: emptied, it is filled with what counts now
    ever = dict(logged)
    logged.clear()
    now = dict(trainer.logged_metrics)
    logged.update(ever | now)
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in now.items()}


def _json_loggers(trainer: pl.Trainer) -> list[JSONLinesLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, JSONLinesLogger)]
