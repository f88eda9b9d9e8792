"""A file of decisions in the run's folder: one JSON object a line, each on disk at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from grit_lightning.runs.metrics_log import JSONLinesLogger
from grit_lightning.runs.values import to_json
from grit_lightning.runs.writing import writes_files


class EventLog:
    """Appends events that carry a `step` to a file beside the metrics; writes only if the run has loggers, on rank zero.

    Args:
        filename: Name in the run's folder (`trainer.log_dir`, or `default_root_dir` where the logger has none).
    """

    def __init__(self, filename: str) -> None:
        """Name the file; the first event makes it."""
        self.filename = filename
        self.path: Path | None = None

    def open(self, trainer: pl.Trainer) -> None:
        """Settle the folder; every process must call it."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective
        self.path = folder / self.filename if writes_files(trainer) and trainer.loggers else None

    def resume(self, trainer: pl.Trainer) -> None:
        """Drop what an earlier attempt wrote after the checkpoint."""
        if self.path is not None and trainer.ckpt_path is not None:
            JSONLinesLogger(self.path.parent, self.path.name).truncate_after(trainer.global_step)

    def write(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Append one line an event."""
        lines = [to_json(event) + "\n" for event in events]
        if self.path is not None and lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
