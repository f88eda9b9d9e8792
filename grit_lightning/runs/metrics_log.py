"""metrics.jsonl: every logged metric, in lines of JSON that any tool can read."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from grit_lightning.errors import InvalidValueError
from grit_lightning.runs.atomic import write_text
from grit_lightning.runs.values import to_json


class JSONLinesLogger(Logger):
    """Appends every call of `log_metrics` as one line to a file in the run's folder.

    A line is `{"step": 49, "epoch": 0, "time": 1767225600.0, "train/loss": 0.69, …}`: the step counts optimizer
    steps from 0 as every logger of Lightning does, the time is in seconds since 1970 (UTC). Non-finite numbers are the
    strings `"NaN"`, `"Infinity"` and `"-Infinity"`. Only rank zero writes, and each line is on disk before the
    call returns. Hyperparameters are not written here: config.yaml holds them.

    Read it with `pandas.read_json(path, lines=True)`.
    """

    def __init__(self, save_dir: str | os.PathLike[str], filename: str = "metrics.jsonl") -> None:
        """Name the file; the first metric makes it.

        Args:
            save_dir: The run's folder. The file, and the checkpoints of a ModelCheckpoint without a path, go directly
                into it.
            filename: The file's name in that folder.
        """
        super().__init__()
        self._folder = Path(save_dir)
        self.path = self._folder / filename

    @property
    def name(self) -> str:
        """Empty: the run's folder has no folders for names inside it."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the run's folder has no folders for versions inside it."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self._folder)

    @property
    def log_dir(self) -> str:
        """The run's folder."""
        return str(self._folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one line.

        Args:
            metrics: Numbers, one-element tensors, or nested mappings of them. An "epoch" among them is put first.
            step: Optimizer steps from 0, or None for metrics that belong to no step.

        Raises:
            TypeError: A metric is not a number.
        """
        head = {"step": step, "epoch": metrics.get("epoch"), "time": round(time.time(), 3)}
        line = to_json({**head, **metrics})
        self._folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write nothing: config.yaml holds the hyperparameters."""

    def mark(self) -> int:
        """Return the present end of the file, in bytes, for `rewind`."""
        return self.path.stat().st_size if self.path.exists() else 0

    @rank_zero_only
    def rewind(self, mark: int) -> None:
        """Drop what was written after `mark`; a file that is shorter is another one, and left alone."""
        if self.mark() > mark:
            os.truncate(self.path, mark)

    @rank_zero_only
    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, so that a resumed run does not hold them twice.

        A last line that was cut off when the earlier attempt was killed is dropped too.

        Args:
            step: The last step that is kept. Lines without a step are kept.

        Raises:
            ValueError: A line that is not the last is not JSON: the file is not ours to rewrite.
        """
        if not self.path.exists():
            return
        kept = []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                logged = json.loads(line)["step"]
            except (ValueError, TypeError, KeyError) as error:
                if number == len(lines) and not line.endswith("\n"):
                    break
                raise InvalidValueError(
                    f"{self.path}, line {number}: expected a JSON object with a step, got {line[:80]!r}. "
                    "Move the file away, or choose another run folder."
                ) from error
            if logged is None or logged <= step:
                kept.append(line if line.endswith("\n") else line + "\n")
        if kept != lines:
            write_text(self.path, "".join(kept))
