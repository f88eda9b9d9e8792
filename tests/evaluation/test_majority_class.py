"""The baseline of closed answers: counted by hand, of any number of classes, by the task's own metrics.

The answer comes from the training rows and is scored on others; a mixture has one for each of its tasks, and free answers none.
"""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from grit_lightning.evaluation.choices import classification_metrics
from grit_lightning.evaluation.majority_class import (
    constant_scores,
    majority_answers,
    majority_class,
    majority_scores,
)


class Task:
    """Rows of given classes in each split."""

    def __init__(self, choices: list[str], **targets: list[int]) -> None:
        self.choices = choices
        self.targets = targets

    def examples(self, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"target": self.targets[split]})

    def metrics(self) -> Any:
        return classification_metrics(len(self.choices)) if self.choices else None


class Mixture:
    def __init__(self, **tasks: Task) -> None:
        self.tasks = tasks


def by_hand(answer: int, targets: list[int], classes: int) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 of each class and their means, from counts."""
    right = sum(target == answer for target in targets)
    precision = [right / len(targets) if c == answer else 0.0 for c in range(classes)]
    recall = [float(c == answer) for c in range(classes)]
    f1 = [2 * p * r / (p + r) if p + r else 0.0 for p, r in zip(precision, recall, strict=True)]
    single = {"precision": precision, "recall": recall, "f1": f1}
    macro = {name: sum(values) / classes for name, values in single.items()}
    if classes > 2:
        return {"accuracy": right / len(targets), **macro}
    positive = {name: values[1] for name, values in single.items()}
    return {"accuracy": right / len(targets), **positive, **{f"macro_{name}": value for name, value in macro.items()}}


@pytest.mark.parametrize(
    ("answer", "targets", "classes"),
    [(1, [1, 1, 0, 1], 2), (0, [1, 1, 0, 1], 2), (2, [0, 1, 2, 2, 2, 1, 0], 3), (3, [0, 1, 2, 3], 4)],
)
def test_one_answer_to_every_row_scores_what_is_counted_by_hand(answer: int, targets: list[int], classes: int) -> None:
    metrics = classification_metrics(classes)
    assert constant_scores(answer, targets, metrics) == pytest.approx(by_hand(answer, targets, classes))
    assert not any(metric.update_called for metric in metrics.values())  # the model's own counts stay as they are


def test_of_equally_frequent_classes_it_is_the_first() -> None:
    assert [majority_class(targets) for targets in ([2, 1, 1, 2], [0], [3, 3, 0])] == [1, 0, 3]


def test_the_answer_comes_from_the_training_rows_and_is_scored_on_the_others() -> None:
    task = Task(["no", "yes"], train=[1, 1, 0], validation=[0, 0, 0, 1], test=[1])
    answers = majority_answers(task)
    assert answers == {"": "yes"}  # though most of the validation rows are a no
    scores = majority_scores(task, "val", answers)
    assert scores == pytest.approx({f"val/{name}": score for name, score in by_hand(1, [0, 0, 0, 1], 2).items()})
    assert majority_scores(task, "test", answers)["test/accuracy"] == 1.0


def test_a_mixture_has_a_baseline_for_each_task_of_closed_answers() -> None:
    mixture = Mixture(
        three=Task(["a", "b", "c"], train=[2, 2, 0], validation=[2, 0, 1, 1]),
        free=Task([], train=[-1], validation=[-1]),
        two=Task(["no", "yes"], train=[0], validation=[0, 1]),
    )
    answers = majority_answers(mixture)
    assert answers == {"three": "c", "two": "no"}
    scores = majority_scores(mixture, "val", answers)
    assert {key for key in scores if key.endswith("accuracy")} == {"val/three/accuracy", "val/two/accuracy"}
    assert (scores["val/three/accuracy"], scores["val/two/macro_f1"]) == pytest.approx((1 / 4, 1 / 3))


@pytest.mark.parametrize("datamodule", [None, object(), Task([], train=[-1], validation=[-1])], ids=type)
def test_without_closed_answers_there_is_none(datamodule: object) -> None:
    assert majority_answers(datamodule) == {}
    assert majority_scores(datamodule, "val", {}) == {}


def test_a_task_whose_training_rows_are_not_known_is_left_out() -> None:
    assert majority_scores(Task(["no", "yes"], test=[1]), "test", {}) == {}
