"""A file of decisions in the run's folder: one JSON object a line, each on disk at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from grit_lightning.runs.metrics_log import JSONLinesLogger
from grit_lightning.runs.values import jsonable


class EventLog:
    """Appends events that carry a `step` to a file beside the metrics; writes only if the run has loggers, on rank zero.

    Args:
        filename: Name in the run's folder (`trainer.log_dir`, or `default_root_dir` where the logger has none).
    """

    def __init__(self, filename: str) -> None:
        """Only names the file; it is made by the first event."""
        self.filename = filename
        self.path: Path | None = None

    def open(self, trainer: pl.Trainer) -> None:
        """Settle the folder; every process must call it."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective
        dev_run = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set outside the Trainer's __init__
        writes = trainer.is_global_zero and bool(trainer.loggers) and not dev_run
        self.path = folder / self.filename if writes else None

    def resume(self, trainer: pl.Trainer) -> None:
        """Drop what an earlier attempt wrote after the checkpoint."""
        if self.path is not None and trainer.ckpt_path is not None:
            JSONLinesLogger(self.path.parent, self.path.name).truncate_after(trainer.global_step)

    def write(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Append one line an event."""
        lines = [json.dumps(jsonable(event), ensure_ascii=False, allow_nan=False) + "\n" for event in events]
        if self.path is not None and lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
