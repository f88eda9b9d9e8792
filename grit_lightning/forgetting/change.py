"""The change between two measurements of the same units, with an interval."""

from __future__ import annotations

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
    interval = bootstrap(
        (difference, weight),
        _ratio,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        confidence_level=confidence,
        method="percentile",  # works for any values; BCa fails where all units changed alike
        rng=np.random.default_rng(SEED),  # its own, so that the training's random numbers stay as they are
    ).confidence_interval
    return change, (float(interval.low), float(interval.high))


def _ratio(difference: NDArray[np.float64], weight: NDArray[np.float64], axis: int = -1) -> Any:
    return difference.sum(axis=axis) / weight.sum(axis=axis)
