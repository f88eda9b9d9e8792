"""Orders of rows in which consecutive rows have similar lengths, so that batches hold little padding. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def bucketed(order: Sequence[int], lengths: Sequence[int], size: int, window: int, seed: int) -> list[int]:
    """Sorts rows by length inside windows and shuffles the batches that this makes.

    Args:
        order: Row numbers, in an order that may be random already.
        lengths: Tokens of each row, by row number.
        size: Rows that are processed together: batch size times number of processes.
        window: Number of such batches that are sorted together; more mean less padding and less random batches.
        seed: Determines the order of the batches, alone.

    Returns:
        The same row numbers. Every `size` of them have similar lengths; if `size` does not divide their number, the
        last batch is the one that is not full.

    Example:
        >>> bucketed([0, 1, 2, 3, 4], [9, 1, 8, 2, 5], size=2, window=2, seed=0)
        [1, 3, 2, 0, 4]
    """
    batches: list[list[int]] = []
    for start in range(0, len(order), size * window):
        inside = sorted(order[start : start + size * window], key=lengths.__getitem__)
        batches += [inside[i : i + size] for i in range(0, len(inside), size)]
    full = len(order) // size
    shuffled = torch.randperm(full, generator=torch.Generator().manual_seed(seed)).tolist()
    return [row for i in (*shuffled, *range(full, len(batches))) for row in batches[i]]
