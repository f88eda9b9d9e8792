"""Orders in which rows are read, as functions of a seed. Pure.

Every order covers all processes: consecutive rows go to different ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def shuffled(rows: int, seed: int) -> list[int]:
    """Return row numbers in the random order of a seed."""
    order: list[int] = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def bucketed(order: Sequence[int], lengths: Sequence[int], size: int, window: int, seed: int) -> list[int]:
    """Sort rows by length inside windows and shuffle the batches that this makes, so that they hold little padding.

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
    return [row for i in (*shuffled(full, seed), *range(full, len(batches))) for row in batches[i]]


def mixed(sizes: Sequence[int], shares: Sequence[int], seed: int, epoch: int) -> list[int]:
    """Draw the rows of an epoch from several tables, so many from each.

    Each table is read through in one random order after another, and an epoch goes on where the one before it stopped:
    over the epochs, the draws of any two rows of a table differ by at most one.

    Args:
        sizes: Rows of each table.
        shares: Rows to draw from each in an epoch.
        seed: Determines all orders, together with the epoch.
        epoch: Number of the epoch, from 0.

    Returns:
        Row numbers in the joined table, in random order.

    Example:
        >>> sorted(mixed([2, 8], [2, 4], seed=0, epoch=0) + mixed([2, 8], [2, 4], seed=0, epoch=1))
        [0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    drawn: list[int] = []
    for table, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        first, last = epoch * share, (epoch + 1) * share
        passes = range(first // size, -(-last // size))
        stream = [row for number in passes for row in shuffled(size, _mix(seed, table, number))]
        begun = first - passes.start * size
        drawn += [sum(sizes[:table]) + row for row in stream[begun : begun + share]]
    return [drawn[i] for i in shuffled(len(drawn), _mix(seed, len(sizes), epoch))]


def shares(weights: Sequence[float], rows: int) -> list[int]:
    """Return whole numbers in proportion to weights that add up to a number of rows (largest remainders).

    Example:
        >>> shares([1, 1, 1], 10)
        [4, 3, 3]
    """
    exact = [weight * rows / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: rows - sum(whole)]:
        whole[i] += 1
    return whole


def _mix(*numbers: int) -> int:
    """Make one seed out of several numbers, so that neighbouring numbers share no random stream."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed
