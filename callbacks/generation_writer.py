"""generations-test.jsonl: what the model said to every prompt of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback

from grit_lightning.distributed.collectives import gather_objects
from grit_lightning.evaluation.generated_answers import AnsweredRow
from grit_lightning.evaluation.generation import Stage
from grit_lightning.runs.atomic import write_text
from grit_lightning.runs.values import to_json
from grit_lightning.runs.writing import writes_files


class GenerationWriter(Callback):
    """Writes generated answers into the run's folder, at the end of a validation, test or prediction.

    `generations-val.jsonl`, `generations-test.jsonl` and `generations-predict.jsonl` hold a line a row, in the order of the
    rows, whatever the number of processes: `row`, `prompt`, `output`, `finished`, `reference` and the scores of the row; of a
    mixture also its `task`, one after the other. A later evaluation of the same kind replaces the file; nothing generated
    leaves it alone. Rank zero writes; `fast_dev_run` and a barebones Trainer write nothing.

    Args:
        folder: Where to write; None is the logger's folder, or the Trainer's root without a logger.
    """

    def __init__(self, folder: str | None = None) -> None:
        """Remember the folder."""
        super().__init__()
        self.folder = folder
        self._rows: list[AnsweredRow] = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        """Keep the batch's answers."""
        self._keep(outputs)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        """Keep the batch's answers."""
        self._keep(outputs)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        """Keep the batch's answers."""
        self._keep({"generations": outputs} if isinstance(outputs, list) else None)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write."""
        self._write(trainer, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write."""
        self._write(trainer, "test")

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write."""
        self._write(trainer, "predict")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Forget an evaluation that did not come to its end."""
        self._rows = []

    def _keep(self, outputs: Any) -> None:
        self._rows += outputs.get("generations", []) if isinstance(outputs, Mapping) else []

    def _write(self, trainer: pl.Trainer, stage: Stage) -> None:
        rows, self._rows = _gathered(self._rows), []
        folder = trainer.log_dir if self.folder is None else self.folder  # on every rank: a logger's is a collective
        if not rows or folder is None or trainer.sanity_checking or not writes_files(trainer):
            return
        rows.sort(key=lambda row: (str(row.get("task")), int(row["row"] or 0)))
        write_text(Path(folder) / f"generations-{stage}.jsonl", "".join(f"{to_json(row)}\n" for row in rows))


def _gathered(rows: list[AnsweredRow]) -> list[AnsweredRow]:
    """Return the rows of all processes; a collective."""
    return [row for part in gather_objects(rows) for row in part]
