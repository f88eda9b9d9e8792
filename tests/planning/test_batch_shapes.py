"""Which micro-batches matter: of the first epoch in the run's own order, and the largest that settings allow."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from torch.utils.data import DataLoader

from grit_lightning.errors import InvalidValueError
from grit_lightning.planning.batch_shapes import largest_allowed, largest_of_first_epoch
from grit_lightning.planning.rehearsal import MicroBatch


class Rows:
    """A data module of rows in their own order."""

    batch_size, max_length, packing = 2, 64, False

    def __init__(self, lengths: list[int], prompts: list[int]) -> None:
        self.table = datasets.Dataset.from_dict({"length": lengths, "prompt_length": prompts})

    def examples(self, split: Any) -> datasets.Dataset:
        return self.table

    def train_dataloader(self) -> Any:
        return DataLoader(self.table, batch_size=self.batch_size)  # type: ignore[arg-type]


def test_the_longest_batch_and_the_one_with_most_labels_are_found() -> None:
    rows = Rows([10, 50, 20, 30, 40], [5, 45, 2, 4, 1])
    assert largest_of_first_epoch(rows) == [MicroBatch(2, 50, 5)]
    rows = Rows([10, 50, 20, 30, 40], [8, 45, 2, 4, 1])
    assert largest_of_first_epoch(rows) == [MicroBatch(2, 50, 8)]
    rows = Rows([48, 50, 20, 30, 40], [40, 45, 2, 4, 1])
    assert largest_of_first_epoch(rows) == [MicroBatch(2, 50, 40), MicroBatch(2, 30, 2)]


def test_spans_say_where_labels_begin() -> None:
    rows = Rows([10, 20], [0, 0])
    rows.table = datasets.Dataset.from_dict({"length": [10, 20], "learnt": [[4, 6, 8, 9], [7, 20]]})
    assert largest_of_first_epoch(rows) == [MicroBatch(2, 20, 4)]


def test_packed_rows_are_full() -> None:
    rows = Rows([10, 20], [1, 1])
    rows.packing = True  # type: ignore[misc]
    assert largest_of_first_epoch(rows) == [MicroBatch(2, 64, 0, packed=True)] == [largest_allowed(rows)]


def test_a_data_module_without_sizes_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"data: expected a data module with `batch_size` and `max_length`"):
        largest_allowed(object())
