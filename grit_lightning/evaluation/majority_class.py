"""The baseline of closed answers: to answer every row with the class that is most frequent among the training rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torchmetrics import MetricCollection

from grit_lightning.evaluation.datamodule_protocols import HasClosedAnswers, evaluation_key, tasks_of


def majority_class(targets: Sequence[int]) -> int:
    """Return the most frequent class, of equally frequent ones the first.

    Example:
        >>> majority_class([2, 0, 2, 1])
        2
    """
    return int(torch.bincount(torch.as_tensor(targets)).argmax())


def constant_scores(answer: int, targets: Sequence[int], metrics: MetricCollection) -> dict[str, float]:
    """Score one answer given to every row.

    Args:
        answer: A class.
        targets: The right class of each row.
        metrics: What to score by, updated with predicted classes and targets, int64 `[B]`. It stays as it is.
    """
    right = torch.as_tensor(targets)
    scores = metrics.clone()(torch.full_like(right, answer), right)  # of this batch alone: no collective
    return {name: float(score) for name, score in scores.items()}


def majority_answers(datamodule: object) -> dict[str, str]:
    """Find the most frequent answer among the training rows of each task of closed answers.

    Args:
        datamodule: Any object, set up for a fit; see `HasClosedAnswers`.

    Returns:
        The answer by the task's name in a mixture, by an empty name for a single task; nothing for free answers.
    """
    return {
        name: task.choices[majority_class(task.examples("train")["target"][:])]
        for name, task in _tasks_of_closed_answers(datamodule).items()
    }


def majority_scores(datamodule: object, stage: Literal["val", "test"], answers: Mapping[str, str]) -> dict[str, float]:
    """Score the majority answers on all rows of a split, under the keys that the model's scores are logged under.

    Args:
        datamodule: Any object, set up for the stage.
        stage: Which split.
        answers: What `majority_answers` returned; tasks that are not in it, or have other choices, are left out.
    """
    scores: dict[str, float] = {}
    for name, task in _tasks_of_closed_answers(datamodule).items():
        metrics = task.metrics()
        if answers.get(name) in task.choices and metrics is not None:
            targets = task.examples("validation" if stage == "val" else "test")["target"][:]
            found = constant_scores(task.choices.index(answers[name]), targets, metrics)
            scores |= {f"{evaluation_key(stage, name)}/{metric}": score for metric, score in found.items()}
    return scores


def _tasks_of_closed_answers(datamodule: object) -> dict[str, HasClosedAnswers]:
    return {
        name: task for name, task in tasks_of(datamodule).items() if isinstance(task, HasClosedAnswers) and task.choices
    }
