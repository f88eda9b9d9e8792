"""generations-test.jsonl: what the model said to every prompt of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback

from grit_lightning.distributed.collectives import gather_objects
from grit_lightning.evaluation.generated_answers import AnsweredRow
from grit_lightning.evaluation.generation import Stage
from grit_lightning.runs.values import jsonable, write_atomically


class GenerationWriter(Callback):
    """Writes the records of generated answers into the run's folder, at the end of a validation, test or prediction.

    `generations-val.jsonl`, `generations-test.jsonl` and `generations-predict.jsonl` hold a line a row, in the order of the
    rows, whatever the number of processes: `row`, `prompt`, `output`, `finished`, `reference` and the scores of the row; of a
    mixture also its `task`, one after the other. A later evaluation of the same kind replaces the file; nothing generated
    leaves it alone. Rank zero writes; ``fast_dev_run`` and a barebones Trainer write nothing.

    Args:
        folder: Where to write; None is the logger's folder, or the Trainer's root without a logger.
    """

    def __init__(self, folder: str | None = None) -> None:
        """Remember the folder."""
        super().__init__()
        self.folder = folder
        self._records: list[AnsweredRow] = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        """Keep the batch's records."""
        self._keep(outputs)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        """Keep the batch's records."""
        self._keep(outputs)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        """Keep the batch's records."""
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
        self._records = []

    def _keep(self, outputs: Any) -> None:
        self._records += outputs.get("generations", []) if isinstance(outputs, Mapping) else []

    def _write(self, trainer: pl.Trainer, stage: Stage) -> None:
        records, self._records = _gathered(self._records), []
        folder = (
            trainer.log_dir if self.folder is None else self.folder
        )  # asked on all ranks, a logger's is a collective
        dry = trainer.barebones or trainer.sanity_checking or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if dry or not records or not trainer.is_global_zero or folder is None:
            return
        records.sort(key=lambda record: (str(record.get("task")), int(record["row"] or 0)))
        lines = (json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False) for record in records)
        write_atomically(Path(folder) / f"generations-{stage}.jsonl", "".join(f"{line}\n" for line in lines))


def _gathered(rows: list[AnsweredRow]) -> list[AnsweredRow]:
    """Return the rows of all processes; a collective."""
    return [row for part in gather_objects(rows) for row in part]
