"""The change between two measurements of the same units, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap
from torch import Tensor

RESAMPLES = 9999
SEED = 0


def mean_change(
    before: Tensor, after: Tensor, weights: Tensor, confidence: float = 0.95
) -> tuple[float, tuple[float, float] | None]:
    """Return the change of a weighted mean, with a percentile bootstrap interval over units.

    The two measurements are paired: a resample draws units, each with its values before and after, so that what makes one
    unit harder than another cancels. The interval says how much the change depends on which units were drawn, not on the seed
    of the training.

    Args:
        before: Values `[N]`.
        after: Values of the same units `[N]`.
        weights: Weights of the units `[N]`; the mean is the sum of values over the sum of weights.
        confidence: Level of the interval, in (0, 1).

    Returns:
        The change, and its interval; None for a single unit.

    Example:
        >>> import torch
        >>> mean_change(torch.tensor([3.0, 5.0]), torch.tensor([3.5, 5.5]), torch.ones(2))
        (0.5, (0.5, 0.5))
    """
    difference, weight = (tensor.double().cpu().numpy() for tensor in (after - before, weights))
    change = float(_ratio(difference, weight))
    if len(weight) < 2:
        return change, None
    interval = _resampled(difference, weight, confidence, SEED).confidence_interval
    return change, (float(interval.low), float(interval.high))


def mean_of_changes(
    sets: Sequence[tuple[Tensor, Tensor, Tensor]], shares: Sequence[float], confidence: float = 0.95
) -> tuple[float, tuple[float, float] | None]:
    """Return a weighted mean over sets of what `mean_change` gives for each, every set resampled within itself.

    Args:
        sets: Values before and after and weights of the units of each set, each `[N_k]`.
        shares: Part of each set in the mean; they add up to 1.
        confidence: Level of the interval, in (0, 1).

    Returns:
        The change, and its interval; None where a set has a single unit.

    Example:
        >>> import torch
        >>> up, same = (torch.zeros(2), torch.full((2,), 0.5), torch.ones(2)), (torch.ones(3), torch.ones(3), torch.ones(3))
        >>> mean_of_changes([up, same], [0.5, 0.5])
        (0.25, (0.25, 0.25))
    """
    numbers = [
        ((after - before).double().cpu().numpy(), weights.double().cpu().numpy()) for before, after, weights in sets
    ]
    change = sum(share * float(_ratio(*pair)) for share, pair in zip(shares, numbers, strict=True))
    if any(len(weight) < 2 for _, weight in numbers):
        return change, None
    draws = sum(
        share * _resampled(difference, weight, confidence, SEED + number).bootstrap_distribution
        for number, (share, (difference, weight)) in enumerate(zip(shares, numbers, strict=True))
    )
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(draws, [tail, 100.0 - tail])
    return change, (float(low), float(high))


def _resampled(difference: NDArray[np.float64], weight: NDArray[np.float64], confidence: float, seed: int) -> Any:
    return bootstrap(
        (difference, weight),
        _ratio,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        confidence_level=confidence,
        method="percentile",  # works for any values; BCa fails where all units changed alike
        rng=np.random.default_rng(seed),  # its own, so that the training's random numbers stay as they are
    )


def _ratio(difference: NDArray[np.float64], weight: NDArray[np.float64], axis: int = -1) -> Any:
    return difference.sum(axis=axis) / weight.sum(axis=axis)
