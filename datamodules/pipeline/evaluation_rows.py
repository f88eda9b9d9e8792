"""Evaluation rows, each of which is counted once, whatever the number of processes.

Every process must see the same number of batches, so the last share is filled up. Lightning's own sampler fills it with
rows that are then evaluated twice; here a filler says so: its `row` is -1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

FILLER = -1


class EvaluationRows(Dataset[dict[str, Any]]):
    """Encoded rows that carry their index as `row`; the index -1 gives a short one with `row` -1, to fill up a batch.

    Args:
        rows: An encoded split, with at least one row.
        lengths: Tokens of each row.
    """

    def __init__(self, rows: datasets.Dataset, lengths: Sequence[int]) -> None:
        """Remember which row is the shortest: it costs least as a filler."""
        self.rows = rows
        self.shortest = min(range(len(lengths)), key=lengths.__getitem__)

    def __len__(self) -> int:
        """Return the number of rows that count."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row, with its `row`."""
        row: dict[str, Any] = self.rows[self.shortest if index == FILLER else index]
        return row | {"row": index}


class EvaluationSampler(DistributedSampler[Any]):
    """Shares rows out to the processes in a given order and fills the last share up with -1.

    A DistributedSampler, so that Lightning leaves it in place.

    Args:
        order: Row numbers in the order of evaluation; consecutive ones go to different processes.
        num_replicas: Number of processes.
        rank: Number of this process.
    """

    def __init__(self, order: Sequence[int], num_replicas: int = 1, rank: int = 0) -> None:
        """Keep the order."""
        super().__init__(order, num_replicas, rank, shuffle=False)  # type: ignore[arg-type]  # it only asks the length
        self.order = order

    def __iter__(self) -> Iterator[int]:
        """Iterate over the row numbers of this process, the same number in every process."""
        filled = [*self.order, *[FILLER] * (self.total_size - len(self.order))]
        return iter(filled[self.rank :: self.num_replicas])
