"""Several tasks in one training run: every batch mixes rows of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import ConcatDataset, DataLoader
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase

from grit_lightning.datamodules.pipeline.orders import mixed, shares
from grit_lightning.datamodules.pipeline.resumable import (
    ResumableDataModule,
    ResumableLoader,
    ResumableSampler,
    loader_options,
)
from grit_lightning.datamodules.pipeline.rows import RowsDataModule
from grit_lightning.errors import InvalidValueError

Task = Callable[[str | PreTrainedTokenizerBase], RowsDataModule]
"""A data module class, or anything else that makes a data module from a tokenizer."""


class MixtureDataModule(ResumableDataModule):
    """Trains on several tasks by weight and evaluates each on its own, under `val/<task>/…` and `test/<task>/…`.

    In YAML, tasks are classes with their settings, which need no tokenizer:

        class_path: MixtureDataModule
        init_args:
          weights: [2, 1]
          tasks:
            - class_path: GSM8KDataModule
            - class_path: BoolQDataModule
              init_args: {source: data/boolq}

    The rows of a task come in one random order after another, and an epoch goes on where the one before it stopped, so
    that over the epochs each row is seen as often as the others. All of this depends on the seed and the epoch only.

    Attributes:
        tasks: The data modules by name: the task's in lower case, with a number from the second of a kind on.
    """

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        tasks: list[Task],
        weights: list[float] | None = None,
        rows_per_epoch: int | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 42,
    ) -> None:
        """Make the data modules of the tasks; files are touched later.

        Args:
            tokenizer: For all tasks: a tokenizer, or the backbone to load it from.
            tasks: Data module classes, with their settings but for the tokenizer and the seed. Their batch sizes are for
                evaluation, and all have to pack or none.
            weights: Share of the rows that each task gives; None for its number of rows.
            rows_per_epoch: Rows of an epoch; None for as many as all tasks have together.
            batch_size: Training rows per batch.
            num_workers: Data-loader processes of the training loader.
            seed: Determines the order of the rows, in place of the tasks' own seeds.

        Raises:
            ValueError: There is no task, weights do not fit the tasks, or a setting is out of range.
        """
        super().__init__()
        if not tasks or (weights is not None and (len(weights) != len(tasks) or min(weights) <= 0)):
            raise InvalidValueError(
                f"tasks and weights: expected tasks and one positive weight for each, got {len(tasks)} tasks and {weights}."
            )
        if min(batch_size, 1 if rows_per_epoch is None else rows_per_epoch) < 1:
            raise InvalidValueError(
                f"batch_size and rows_per_epoch: expected numbers of at least 1, got {batch_size=}, {rows_per_epoch=}."
            )
        self.weights = weights
        self.rows_per_epoch = rows_per_epoch
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.tasks: dict[str, RowsDataModule] = {}
        for make in tasks:
            task = make(tokenizer)
            task.seed = seed
            self._add(task)
        if len({task.packing for task in self.tasks.values()}) > 1:
            packs = {name: task.packing for name, task in self.tasks.items()}
            raise InvalidValueError(
                f"tasks: expected that all of them pack or none, got packing={packs}. Set packing alike in each."
            )

    def _add(self, task: RowsDataModule) -> None:
        name = task.task_name.lower()
        alike = sum(other.task_name.lower() == name for other in self.tasks.values())
        self.tasks[f"{name}{alike + 1}" if alike else name] = task

    @property
    def max_length(self) -> int:
        """Upper bound on the tokens of a row, in any task."""
        return max(task.max_length for task in self.tasks.values())

    def metrics(self) -> dict[str, MetricCollection | None]:
        """Return the metrics of each task, by its name, in the order of the evaluation loaders."""
        return {name: task.metrics() for name, task in self.tasks.items()}

    def prepare_data(self) -> None:
        """Download and tokenise what the tasks lack."""
        for task in self._attach_tasks():
            task.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up all tasks; raise what they raise."""
        for task in self._attach_tasks():
            task.setup(stage)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader per task."""
        return [task.val_dataloader() for task in self._attach_tasks()]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader per task."""
        return [task.test_dataloader() for task in self._attach_tasks()]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader per task, in the order of its source."""
        return [task.predict_dataloader() for task in self._attach_tasks()]

    def _attach_tasks(self) -> Sequence[RowsDataModule]:
        """Give the tasks the Trainer, which knows how many processes there are, and one tokenizer; return them."""
        tasks = list(self.tasks.values())
        for task in tasks:
            task.trainer, task._tokenizer = self.trainer, tasks[0].tokenizer
        return tasks

    @property
    def _is_set_up(self) -> bool:
        return all(task._is_set_up for task in self.tasks.values())

    def _make_train_loader(self) -> ResumableLoader:
        tables = [task.training_rows()[0] for task in self._attach_tasks()]
        sizes = [len(table) for table in tables]  # type: ignore[arg-type]  # torch's Dataset declares no length
        drawn = shares(self.weights or sizes, self.rows_per_epoch or sum(sizes))

        def order(epoch: int) -> list[int]:
            return mixed(sizes, drawn, self.seed, epoch)

        first = next(iter(self.tasks.values()))
        name = f"mixture of {dict(zip(self.tasks, drawn, strict=True))}"
        # The epoch is as long as what is drawn, whatever the tables hold.
        sampler = ResumableSampler(range(sum(drawn)), seed=self.seed, order=order, order_name=name, **self._replicas)  # type: ignore[arg-type]
        options = loader_options(self.num_workers, self.seed) | {"collate_fn": first.collator(), "sampler": sampler}
        return ResumableLoader(ConcatDataset(tables), batch_size=self.batch_size, **options)
