"""summary.json and the table in the terminal: what a run did, what came of it, and what it cost."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from peft.tuners.lora import LoraLayer
from rich.console import Console
from torch import nn

from grit_lightning.callbacks.step_timer import StepTimer
from grit_lightning.errors import require
from grit_lightning.evaluation.majority_class import majority_answers, majority_scores
from grit_lightning.geometry.sites import count_trainable
from grit_lightning.runs import provenance
from grit_lightning.runs.atomic import write_json
from grit_lightning.runs.metrics_log import JSONLinesLogger
from grit_lightning.runs.summary_table import summary_table
from grit_lightning.runs.writing import writes_files

FILENAME = "summary.json"


@runtime_checkable
class Reports(Protocol):
    """A callback that has something to say in `summary.json`."""

    def report(self) -> Mapping[str, Any]:
        """Return entries of `summary.json` by name, none as long as there is nothing to say; runs on rank zero only."""


class RunRecord(Callback):
    """Writes `summary.json` into the run's folder when a run ends, and prints its table.

    It is written at the end of a fit, when a run fails or is interrupted, and after every validation or test outside a
    fit. What is measured by a validation or test before the fit is the metric *before*; by the last validation of the
    fit, by one after it, or by one of a checkpoint, *after*. In a process that only evaluates, the metrics are added to
    the `summary.json` that the folder already holds. Only rank zero writes, about its own memory and times.
    `fast_dev_run` writes no file; a barebones Trainer neither file nor table.

    Times need a `StepTimer` among the Trainer's callbacks: without one they are null.

    Keys of `summary.json` (null where something was not measured; NaN and infinity as strings, see `jsonable`):

    - `status`: `finished`, `failed`, `interrupted`, or `evaluated` if nothing was trained; `error`: the
      exception's type and message.
    - `metrics`: `before`, `after` (keys `val/…`, `test/…`), `train` (keys `train/…`, the last logged) and, for closed
      answers, `majority`: the scores, on the same rows, of always giving the answer that is the most frequent one among the
      training rows. It is left out if the Trainer evaluates on a part of the rows (`limit_val_batches`).
    - `majority_class`: that answer, by the task's name in a mixture, by an empty name otherwise.
    - `trainable_parameters`, `effective_parameters`: numbers of the adapter as trained, and at its effective ranks.
    - `ranks`: effective rank by layer; `mean_rank`; `mean_rank_by_type`: by the last part of the layer's name.
    - `reprojection_count`; `counters`: the geometry's events by name.
    - `steps_timed`; `step_time_seconds`: `mean`, `p95`, `p99`; `geometry_share` of the step time, 0 to 1;
      `time_split_seconds`: mean seconds a step by section. All of this attempt, see `StepTimer`.
    - `peak_memory_bytes`: on the device of the training (the process's memory on a CPU); `peak_rss_bytes`: the
      process's; `wall_seconds`: of the fit, earlier attempts included.
    - `global_step`, `epoch`, `seed`, `device`, `world_size`, `versions`, and `git_commit` and
      `git_dirty` of the working directory.
    - what other callbacks report (`Reports`): `forgetting`, of a `ForgettingProbe`.

    On resume it drops the lines that an earlier attempt wrote to metrics.jsonl after the checkpoint.
    """

    def __init__(
        self, folder: str | None = None, table: Literal["fit_end", "evaluation_end", "never"] = "fit_end"
    ) -> None:
        """Check and store the settings.

        Args:
            folder: Where to write; None is the logger's folder, or the Trainer's root without a logger.
            table: When the table is printed: after the fit, after every evaluation that follows it, or never.

        Raises:
            ValueError: `table` is none of these.
        """
        known = table in ("fit_end", "evaluation_end", "never")
        require("RunRecord", "table", known, "fit_end, evaluation_end or never", table)
        self.folder = folder
        self.table = table
        self.summary: dict[str, Any] = {}
        """What was last written."""
        self._path: Path | None = None
        self._before: dict[str, Any] = {}
        self._after: dict[str, Any] = {}
        self._majority: dict[str, Any] = {}
        self._majority_answers: dict[str, str] = {}
        self._fitted = self._table_due = False
        self._wall_seconds = 0.0  # of the fits that have ended
        self._fit_started: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle where to write."""
        folder = trainer.log_dir if self.folder is None else self.folder  # on every rank: a logger's is a collective
        self._path = Path(folder) / FILENAME if folder is not None and writes_files(trainer) else None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._fitted = True
        self._fit_started = time.perf_counter()
        self._after = {}
        self._majority_answers = majority_answers(_datamodule(trainer))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On resume, leave each step in metrics.jsonl once."""
        if trainer.ckpt_path is not None:
            for logger in trainer.loggers:
                if isinstance(logger, JSONLinesLogger):
                    logger.truncate_after(trainer.global_step - 1)  # loggers count steps from 0

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the summary; the table waits for `teardown`."""
        self._stop_clock()
        self._after |= _evaluated(trainer)
        self._score_majority(trainer, "val")
        self._write(trainer, pl_module, "finished")
        self._table_due = self.table == "fit_end"

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the metrics and write the summary, unless the fit does that when it ends."""
        self._on_evaluation_end(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the metrics and write the summary."""
        self._on_evaluation_end(trainer, pl_module, "test")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write the summary of a run that did not reach its end; one whose checkpoint was refused keeps the summary it had."""
        if trainer.ckpt_path is not None and not self._fitted:
            return
        self._stop_clock()
        interrupted = isinstance(exception, KeyboardInterrupt | SystemExit)
        error = f"{type(exception).__name__}: {exception}"
        self._write(trainer, pl_module, "interrupted" if interrupted else "failed", error)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the table, now that progress bars are closed."""
        if self._table_due and trainer.is_global_zero and not trainer.barebones:
            console = Console()
            console.print(summary_table(self.summary))
            if self._path is not None:
                console.print(str(self._path), style="dim", soft_wrap=True)
        self._table_due = False

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run cannot measure again."""
        return {"before": self._before, "wall_seconds": self._wall_seconds + self._running_seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over from an earlier attempt; metrics measured in this process go first."""
        self._before = {**state_dict["before"], **self._before}
        self._wall_seconds = state_dict["wall_seconds"]

    def _on_evaluation_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Literal["val", "test"]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING or trainer.barebones:
            return
        metrics = self._after if self._fitted or trainer.ckpt_path is not None else self._before
        metrics |= _evaluated(trainer)
        if not self._fitted and self._path is not None and self._path.exists():
            self._add_metrics_to(self._path, trainer, stage)
            return
        self._score_majority(trainer, stage)
        self._write(trainer, pl_module, str(self.summary.get("status", "evaluated")), self.summary.get("error"))
        self._table_due = self._fitted and self.table == "evaluation_end"

    def _add_metrics_to(self, path: Path, trainer: pl.Trainer, stage: Literal["val", "test"]) -> None:
        self.summary = json.loads(path.read_text(encoding="utf-8"))
        self._majority_answers = self.summary.setdefault("majority_class", {})
        self._score_majority(trainer, stage)
        for when, found in (("before", self._before), ("after", self._after), ("majority", self._majority)):
            self.summary["metrics"][when] = self.summary["metrics"].get(when, {}) | found
        write_json(path, self.summary)

    def _score_majority(self, trainer: pl.Trainer, stage: Literal["val", "test"]) -> None:
        """Score the baseline on the rows that the model is scored on, if these are all of the split."""
        evaluated = trainer.limit_val_batches if stage == "val" else trainer.limit_test_batches
        if evaluated == 1.0 and isinstance(evaluated, float):  # as an integer, 1 is one batch
            self._majority |= majority_scores(_datamodule(trainer), stage, self._majority_answers)

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, status: str, error: str | None = None) -> None:
        if trainer.barebones or not trainer.is_global_zero:
            return
        result: dict[str, Any] = {"status": status, "error": error, "metrics": self._metrics(trainer)}
        result["majority_class"] = self._majority_answers
        timer = _step_timer(trainer)
        self.summary = result | _adapter(pl_module) | _times(timer) | self._circumstances(trainer, pl_module)
        for callback in _callbacks(trainer):
            if isinstance(callback, Reports):
                self.summary |= callback.report()
        if self._path is not None:
            write_json(self._path, self.summary)

    def _metrics(self, trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
        train = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("train/")}
        train = train or self.summary.get("metrics", {}).get("train", {})
        return {
            "before": dict(self._before),
            "after": dict(self._after),
            "majority": dict(self._majority),
            "train": train,
        }

    def _circumstances(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        commit, dirty = provenance.git_state()
        return {
            "peak_memory_bytes": provenance.peak_memory_bytes(pl_module.device),
            "peak_rss_bytes": provenance.peak_rss_bytes(),
            "wall_seconds": self._wall_seconds,
            "global_step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "seed": provenance.global_seed(),
            "device": provenance.device_name(pl_module.device),
            "world_size": trainer.world_size,
            "versions": provenance.versions(),
            "git_commit": commit,
            "git_dirty": dirty,
        }

    def _running_seconds(self) -> float:
        return 0.0 if self._fit_started is None else time.perf_counter() - self._fit_started

    def _stop_clock(self) -> None:
        self._wall_seconds += self._running_seconds()
        self._fit_started = None


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside the Trainer's __init__
    return callbacks


def _datamodule(trainer: pl.Trainer) -> object:
    return trainer.datamodule  # type: ignore[attr-defined]  # set outside the Trainer's __init__


def _step_timer(trainer: pl.Trainer) -> StepTimer | None:
    return next((callback for callback in _callbacks(trainer) if isinstance(callback, StepTimer)), None)


def _evaluated(trainer: pl.Trainer) -> dict[str, float]:
    metrics = trainer.callback_metrics
    return {key: float(value) for key, value in metrics.items() if key.startswith(("val/", "test/"))}


def _adapter(pl_module: pl.LightningModule) -> dict[str, Any]:
    geometry = getattr(pl_module, "geometry", None)
    if geometry is None:
        ranks, trainable = _allocated_ranks(pl_module), count_trainable(pl_module)
        effective, reprojections, counters = trainable, 0, {}
    else:
        ranks, trainable, effective = geometry.ranks, geometry.trainable_parameters, geometry.effective_parameters
        reprojections, counters = geometry.reprojection_count, geometry.counters
    by_type: dict[str, list[int]] = {}
    for layer, rank in ranks.items():
        by_type.setdefault(layer.rpartition(".")[2], []).append(rank)
    return {
        "trainable_parameters": trainable,
        "effective_parameters": effective,
        "ranks": ranks,
        "mean_rank": sum(ranks.values()) / len(ranks) if ranks else None,
        "mean_rank_by_type": {kind: sum(found) / len(found) for kind, found in by_type.items()},
        "reprojection_count": reprojections,
        "counters": counters,
    }


def _allocated_ranks(pl_module: pl.LightningModule) -> dict[str, int]:
    """Rank by layer of a plain LoRA, named as the geometry names its layers; empty for other adapters."""
    model = getattr(pl_module, "model", None)
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return {name: max(module.r.values()) for name, module in modules if isinstance(module, LoraLayer) and module.r}


def _times(timer: StepTimer | None) -> dict[str, Any]:
    timed: Mapping[str, Any] = {} if timer is None else timer.summary()
    return {
        "steps_timed": timed.get("measured_steps", 0),
        "step_time_seconds": {name: timed.get(name) for name in ("mean", "p95", "p99")},
        "geometry_share": timed.get("geometry_share"),
        "time_split_seconds": timed.get("split", {}),
    }
