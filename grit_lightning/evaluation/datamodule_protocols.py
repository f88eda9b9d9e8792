"""What `GritLitModule` uses of a data module; `TaskDataModule` and `MixtureDataModule` provide all of it.

Everything is optional: any `LightningDataModule` can be trained on, and is evaluated by its loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import datasets
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase


@runtime_checkable
class HasMaxLength(Protocol):
    """A bound on the length of rows, which is compared with the model's context before the first step.

    Attributes:
        max_length: Tokens of the longest row; None for no bound.
    """

    max_length: int | None


@runtime_checkable
class HasTokenizer(Protocol):
    """The tokenizer that rows are turned into tokens with; it is compared with the model's embeddings.

    Attributes:
        tokenizer: Turns texts into tokens.
    """

    tokenizer: PreTrainedTokenizerBase


@runtime_checkable
class HasMetrics(Protocol):
    """Metrics of closed answers, updated with predicted classes and targets, int64 `[B]`."""

    def metrics(self) -> MetricCollection | Mapping[str, MetricCollection | None] | None:
        """Return the task's metrics, for a mixture those of each task by name; None without closed answers."""


@runtime_checkable
class HasClosedAnswers(Protocol):
    """A task whose answers are classes, for the baseline that ends a run's table.

    Attributes:
        choices: The closed answers in class order; empty for free answers.
    """

    choices: Sequence[str]

    def examples(self, split: Literal["train", "validation", "test"]) -> datasets.Dataset:
        """Return at least the column `target` of a split that is set up: the class of each row."""

    def metrics(self) -> MetricCollection | None:
        """Return the metrics of its answers."""


@runtime_checkable
class HasTasks(Protocol):
    """A mixture: several tasks, each with its own evaluation loader, in this order.

    Attributes:
        tasks: Data modules, by the name that their results are logged under.
    """

    tasks: Mapping[str, object]


@runtime_checkable
class GenerativeTask(Protocol):
    """What evaluation by generated answers needs of a task.

    Attributes:
        tokenizer: Turns tokens into texts.
        choices: Closed answers in class order; empty for free answers.
        text_metrics: Names of the metrics that score answers, see `text_metrics.text_metrics`.
    """

    tokenizer: PreTrainedTokenizerBase
    choices: Sequence[str]
    text_metrics: Sequence[str]

    def examples(self, split: Literal["train", "validation", "test"]) -> datasets.Dataset:
        """Return the columns `reference`, `target` and `prompt_length` of a split; a batch's `row` indexes its rows."""


def tasks_of(datamodule: object) -> Mapping[str, object]:
    """Return the tasks of a mixture by name; for anything else, the object itself under an empty name."""
    return datamodule.tasks if isinstance(datamodule, HasTasks) else {"": datamodule}


def evaluation_key(stage: str, task: str) -> str:
    """Return the key that results are logged under: the stage, followed in a mixture by the task's name.

    Example:
        >>> evaluation_key("val", ""), evaluation_key("val", "boolq")
        ('val', 'val/boolq')
    """
    return f"{stage}/{task}" if task else stage
