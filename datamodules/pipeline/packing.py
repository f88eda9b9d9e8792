"""Several documents in one row: hardly any padding where answers are short and the maximal length is long.

Documents of a row do not attend to each other: `position_ids` restart at 0 with each of them, which is what
`GritLitModule` tells them apart by.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from grit_lightning.datamodules.pipeline.collate import learnt_labels


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Share documents out to rows: the longest first, each into the fullest row that has room for it (best fit).

    Args:
        lengths: Tokens of each document, none above the capacity.
        capacity: Tokens that a row may hold.

    Returns:
        Document numbers of each row; every document is in one row.

    Example:
        >>> pack([5, 9, 4, 1], capacity=10)
        [[1, 3], [0, 2]]
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room that is left in a row, and its number, ascending
    for document in sorted(range(len(lengths)), key=lambda document: -lengths[document]):
        position = bisect_left(free, (lengths[document], -1))
        room, row = free.pop(position) if position < len(free) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(document)
        insort(free, (room - lengths[document], row))
    return rows


class PackedRows(Dataset[dict[str, Tensor]]):
    """Encoded rows, several at a time. Which ones share a row depends on their lengths alone.

    Args:
        rows: Encoded rows with `input_ids` and `learnt`.
        lengths: Tokens of each.
        capacity: Tokens that a packed row may hold.
    """

    def __init__(self, rows: datasets.Dataset, lengths: Sequence[int], capacity: int) -> None:
        """Decide what goes where; tokens are read when a row is asked for."""
        self.rows = rows
        self.packs = pack(lengths, capacity)

    def __len__(self) -> int:
        """Return the number of packed rows."""
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `input_ids`, `labels` and `position_ids`, each int64 [T]."""
        documents = [self.rows[document] for document in self.packs[index]]
        return {
            "input_ids": torch.cat([torch.tensor(document["input_ids"]) for document in documents]),
            "labels": torch.cat([learnt_labels(document) for document in documents]),
            "position_ids": torch.cat([torch.arange(len(document["input_ids"])) for document in documents]),
        }
