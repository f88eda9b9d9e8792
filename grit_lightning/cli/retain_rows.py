"""The task's rows for `grit retain`: some that its data module trains on, others to measure on, and a metric of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from peft import PeftModel
from torch import Tensor

from grit_lightning.backbones.inputs import accepted_arguments
from grit_lightning.batches import model_inputs
from grit_lightning.datamodules.mixture import MixtureDataModule
from grit_lightning.datamodules.pipeline.batch_rows import rows_of_batches
from grit_lightning.datamodules.pipeline.rows import RowsDataModule
from grit_lightning.datamodules.pipeline.splits import draw
from grit_lightning.editing.measuring import Metric
from grit_lightning.editing.rows import Row
from grit_lightning.errors import InvalidValueError, did_you_mean
from grit_lightning.evaluation.choices import choice_scores
from grit_lightning.evaluation.generated_answers import AnswerEvaluation
from grit_lightning.evaluation.generation import GenerationSettings

ACCURACY = "accuracy"
GENERATED: Mapping[str, tuple[str, ...]] = {
    "exact_match": ("exact_match", "exact_match_flexible"),
    "exact_text": ("exact_text",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "bertscore": ("bertscore_precision", "bertscore_recall", "bertscore_f1"),
    "classification": ("generated_accuracy",),
}
"""Scores of a generated answer, by the name in a data module's `text_metrics`; what belongs to a whole corpus has none."""
_CALLED = {"generated_accuracy": "correct"}  # in the rows of generations


class TaskRows(NamedTuple):
    """Rows of a task.

    Attributes:
        calibration: Rows that it was trained on, to take statistics from.
        held_out: Validation rows, to measure on.
        remarks: What is worth knowing about them.
        metric: Scores a model on the held-out rows; None if none was asked for.
    """

    calibration: list[Row]
    held_out: list[Row]
    remarks: list[str]
    metric: Metric | None = None


def task_rows(
    module: LightningDataModule,
    calibration: int,
    held_out: int,
    seed: int,
    metric: str | None = None,
    generation: GenerationSettings | None = None,
    batch_size: int = 4,
) -> TaskRows:
    """Draw rows of a task; those to measure on are of the validation split, and no training rows by their tokens.

    Args:
        module: Any data module; of a mixture, each task gives its share.
        calibration: How many training rows to draw; fewer where there are no more.
        held_out: How many validation rows to draw.
        seed: Determines the draw.
        metric: `accuracy` of closed answers, or one of `GENERATED`.
        generation: How answers are generated; None for the defaults.
        batch_size: Rows that are answered together.

    Raises:
        ValueError: The data module has no such rows or no such metric.
    """
    if not isinstance(module, RowsDataModule | MixtureDataModule):
        if metric is not None:
            raise InvalidValueError(
                f"--task_metric: expected none for a {type(module).__name__}, whose answers are unknown here, got {metric!r}. "
                "Leave it out."
            )
        return _of_others(module, calibration, held_out)
    module.setup("fit")
    tasks = list(module.tasks.values()) if isinstance(module, MixtureDataModule) else [module]
    if metric is not None and len(tasks) > 1:
        raise InvalidValueError(
            f"--task_metric: expected none for a mixture, which has no metric of its own, got {metric!r}. Leave it out."
        )
    found = TaskRows([], [], [])
    for task in tasks:
        trained, judged = task.examples("train"), task.examples("validation")
        chosen = draw(len(judged), -(-held_out // len(tasks)), seed)
        kept = _not_trained_on(judged, chosen, trained)
        found.calibration.extend(_rows(trained, draw(len(trained), -(-calibration // len(tasks)), seed)))
        found.held_out.extend(_rows(judged, kept))
        found.remarks.extend(_remarks(task, len(chosen), len(kept)))
        if metric is not None:
            found = found._replace(metric=metric_of(task, kept, metric, generation or GenerationSettings(), batch_size))
    return found


def _remarks(task: RowsDataModule, drawn: int, kept: int) -> Iterator[str]:
    """Say what is worth knowing of the rows to measure on.

    Raises:
        ValueError: There are none.
    """
    if not kept:
        raise InvalidValueError(
            f"data: expected validation rows of {task.task_name} that are no training rows, got {drawn} that are. A choice "
            "measured on what was learnt looks better than it is: set data.source to rows with a split of their own."
        )
    if kept < drawn:
        yield f"{task.task_name}: {drawn - kept} of {drawn} validation rows are training rows too, and are left out."
    if task.table.test_split == "validation":
        yield f"{task.task_name}: {kept} rows of the validation split, on which results are reported, steer the choice here."


def metric_of(
    task: RowsDataModule, rows: Sequence[int], name: str, settings: GenerationSettings, batch_size: int
) -> Metric:
    """Return what scores a model on validation rows of a task: 0 to 1 for each row, larger is better.

    Raises:
        ValueError: The task has no such metric.
    """
    known = ([ACCURACY] if task.choices else []) + [
        score for metric in task.text_metrics for score in GENERATED.get(metric, ())
    ]
    if name not in known:
        raise InvalidValueError(
            f"--task_metric: expected {'one of ' if len(known) > 1 else ''}{', '.join(known) or 'none'} for "
            f"{task.task_name}, got {name!r}.{did_you_mean(name, known)}"
        )
    examples, collate = task.examples("validation"), task.collator(evaluating=True)

    def batches(device: torch.device) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for start in range(0, len(rows), batch_size):
            members = [examples[index] | {"row": index} for index in rows[start : start + batch_size]]
            yield start, {key: value.to(device) for key, value in collate(members).items()}

    def accuracy(model: PeftModel) -> Tensor:
        accepted, right = accepted_arguments(model), []
        for _, batch in batches(model.device):
            logits = model(**model_inputs(batch, accepted, with_loss=False), use_cache=False).logits
            right.append(choice_scores(model, batch, logits).argmax(-1) == batch["target"])
        return torch.cat(right).double()

    def generated(model: PeftModel) -> Tensor:
        evaluation = AnswerEvaluation(chosen, task, "val", model.device)
        answered = [
            row
            for start, batch in batches(model.device)
            for row in evaluation(model, batch, start == 0, rank=0, ranks=1)
        ]
        return torch.tensor([float(row[_CALLED.get(name, name)] or 0) for row in answered], dtype=torch.float64)

    encoder = settings.bertscore_encoder if name.startswith("bertscore") else None
    chosen = replace(settings, max_rows=None, bertscore_encoder=encoder)
    return accuracy if name == ACCURACY else generated


def _rows(examples: Any, numbers: Sequence[int]) -> list[Row]:
    chosen = examples.select_columns(["input_ids", "learnt"]).select(numbers)
    return [dict(row) for row in chosen]


def _not_trained_on(judged: Any, chosen: Sequence[int], trained: Any) -> list[int]:
    """Return the chosen rows without those whose tokens are a training row's."""
    mine = {number: _content(row["input_ids"]) for number, row in zip(chosen, _rows(judged, chosen), strict=True)}
    wanted, found = set(mine.values()), set()
    for batch in trained.select_columns(["input_ids"]).with_format("numpy").iter(1_000):
        found |= wanted.intersection(map(_content, batch["input_ids"]))
    return [number for number, content in mine.items() if content not in found]


def _content(ids: Any) -> bytes:
    return np.asarray(ids, dtype=np.int32).tobytes()


def _of_others(module: LightningDataModule, calibration: int, held_out: int) -> TaskRows:
    """Take the first rows of the batches of anybody's data module."""
    module.prepare_data()
    module.setup("fit")
    if not is_overridden("val_dataloader", module):
        raise InvalidValueError(
            f"data: expected validation rows to measure on, got a {type(module).__name__} without val_dataloader. Add one."
        )
    first = _first_rows(module.train_dataloader, calibration)
    content = {_content(row["input_ids"]) for row in first}
    second = _first_rows(module.val_dataloader, held_out)
    kept = [row for row in second if _content(row["input_ids"]) not in content]
    if not kept:
        raise InvalidValueError(
            f"data: expected validation rows that are no training rows, got none in the first batches of a "
            f"{type(module).__name__}. Change them."
        )
    return TaskRows(first, kept, [])


def _first_rows(loader: Callable[[], Any], count: int) -> list[Row]:
    found, _ = rows_of_batches(islice(loader(), count))  # a batch has a row at least
    pairs = zip(found.tokens[:count], found.learnt[:count], strict=True)
    return [{"input_ids": ids.tolist(), "learnt": [int(end) for end in learnt]} for ids, learnt in pairs]
