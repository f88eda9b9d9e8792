"""How many directions every layer keeps when all layers share one threshold or one budget.

Notation as in `rank`; besides, c_l is the cost of one direction of layer l in parameters, d_in + d_out. Directions are
kept in order of gain over cost until the gain of those left out is small enough: the greedy solution of the knapsack,
optimal up to the last direction taken.
"""

import math

import torch
from torch import Tensor

from grit_lightning.functional._common import (
    check_fraction,
    check_not_negative,
    check_rank_limits,
    check_spectrum,
)
from grit_lightning.functional.rank import _clamp, _denoised, _slack, _tail_sums


def global_energy_rank(
    values: Tensor,
    threshold: float,
    cost_per_rank: Tensor,
    min_rank: int = 1,
    max_rank: int | Tensor | None = None,
) -> Tensor:
    """Apply one energy threshold to all layers: keep a share τ of Σ_l Σ_i λ_li with few parameters.

    λ must be comparable between layers: balanced σ²
    (a loss) is, eigenvalues of Σ_a in an arbitrary gauge are not.

    Source: beyond the paper.

    Args:
        values: Descending spectra `[L, r]`; layers of smaller rank are padded with zeros and bounded by `max_rank`.
        threshold: τ in (0, 1].
        cost_per_rank: Parameters that one direction costs, d_in + d_out, `[L]`.
        min_rank: Lower bound, 0 ≤ min_rank ≤ r.
        max_rank: Upper bound, an int or `[L]`; None means r.

    Returns:
        Ranks, int64 `[L]`; max_rank for layers with an all-zero spectrum.

    Raises:
        ValueError: τ outside (0, 1], bounds that do not fit, or shapes that do not match.

    Example:
        >>> global_energy_rank(torch.tensor([[8.0, 1.0], [0.5, 0.5]]), 0.9, torch.tensor([10, 10]), min_rank=0)
        tensor([2, 0])
    """
    check_spectrum("values", values)
    check_fraction("threshold", threshold, open_left=True)
    gain = _denoised(values).double()
    allowed = (1.0 - threshold + _slack(values)) * gain.sum()
    return _greedy_rank(gain, allowed, cost_per_rank, min_rank, max_rank)


def global_budget_rank(
    sigma: Tensor,
    budget: float,
    cost_per_rank: Tensor,
    min_rank: int = 1,
    max_rank: int | Tensor | None = None,
) -> Tensor:
    """Apply one loss budget to all layers: Σ_l ½ Σ_{i>k_l} σ_li² ≤ budget, spending parameters where they buy most loss.

    Source: beyond the paper.

    Args:
        sigma: Balanced spectra, descending `[L, r]`; layers of smaller rank are padded with zeros and bounded by
            `max_rank`.
        budget: Allowed increase of the loss, all layers together (nats per token), ≥ 0.
        cost_per_rank: Parameters that one direction costs, d_in + d_out, `[L]`.
        min_rank: Lower bound, 0 ≤ min_rank ≤ r.
        max_rank: Upper bound, an int or `[L]`; None means r.

    Returns:
        Ranks, int64 `[L]`; max_rank for layers with an all-zero spectrum.

    Raises:
        ValueError: A negative budget, bounds that do not fit, or shapes that do not match.

    Example:
        >>> global_budget_rank(torch.tensor([[4.0, 1.0], [2.0, 1.0]]), 1.0, torch.tensor([10, 10]))
        tensor([1, 1])
    """
    check_spectrum("sigma", sigma)
    check_not_negative("budget", budget)
    gain = 0.5 * _denoised(sigma).double().square()
    allowed = torch.as_tensor(budget * (1.0 + _slack(sigma)), dtype=gain.dtype, device=gain.device)
    return _greedy_rank(gain, allowed, cost_per_rank, min_rank, max_rank)


def _greedy_rank(
    gain: Tensor, allowed_loss: Tensor, cost_per_rank: Tensor, min_rank: int, max_rank: int | Tensor | None
) -> Tensor:
    """Keep directions in order of gain/cost until the gain of the others is at most `allowed_loss`."""
    layers, r = gain.shape
    limit = check_rank_limits(min_rank, max_rank, r)
    if cost_per_rank.shape != (layers,):
        raise ValueError(f"cost_per_rank: expected one cost per layer {(layers,)}, got {tuple(cost_per_rank.shape)}")
    ceiling = torch.as_tensor(limit, device=gain.device).expand(layers)
    index = torch.arange(r, device=gain.device)
    # Within a layer the gain descends at one cost, so a stable order always takes a prefix of its directions.
    score = (gain / cost_per_rank.to(gain).unsqueeze(-1)).masked_fill(index < min_rank, math.inf)
    score = score.masked_fill(index >= ceiling.unsqueeze(-1), -math.inf)
    order = score.flatten().argsort(descending=True, stable=True)
    left_out = _tail_sums(gain.flatten()[order])[:-1]
    kept = torch.zeros(layers * r, dtype=torch.bool, device=gain.device).scatter(0, order, left_out > allowed_loss)
    ranks = torch.where(gain[..., 0] > 0, kept.reshape(layers, r).sum(dim=-1), r)
    return _clamp(ranks, min_rank, limit)
