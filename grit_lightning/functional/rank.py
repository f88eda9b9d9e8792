"""How many directions of its spectrum every layer keeps.

Notation: values `[L, r]` is one descending, nonnegative spectrum per layer (eigenvalues λ of a factor, or the
balanced σ); E(m) = Σ_{i≤m} λ_i / Σ_i λ_i is its cumulative energy; k `[L]` int64 the ranks chosen.

A layer whose spectrum is all zero has given no evidence, and no evidence is no reason to reduce: it keeps `max_rank`
(or its current rank, where there is one). Rounding: eigenvalues below r·eps of the largest are zero, and an energy
within r·eps of a threshold has reached it (eps of the dtype of the values). Ranks stay on the device of the values.

Hysteresis asks a rule three times: strictly, plainly and loosely. What `rank_with_hysteresis` makes of the three answers
is the same for every rule.
"""

import torch
from torch import Tensor

from grit_lightning.functional._common import (
    check_fraction,
    check_not_negative,
    check_rank,
    check_rank_limits,
    check_spectrum,
    working,
)
from grit_lightning.functional.reprojection import rank_mask


def cumulative_energy(values: Tensor) -> Tensor:
    """Return the share of the energy in the first m directions: E(m) = Σ_{i≤m} λ_i / Σ_i λ_i.

    Source: paper § 'dynamic rank'.

    Args:
        values: Descending spectra `[L, r]`.

    Returns:
        E(1) … E(r), `[L, r]`, float32 or better; all zero for an all-zero spectrum.

    Raises:
        ValueError: `values` is not `[L, r]`.

    Example:
        >>> cumulative_energy(torch.tensor([[6.0, 3.0, 1.0]]))
        tensor([[0.6000, 0.9000, 1.0000]])
    """
    check_spectrum("values", values)
    values = _denoised(values)
    total = values.sum(dim=-1, keepdim=True)
    # One minus the tail, because the tail of a rank-deficient spectrum is exactly zero and its energy exactly one.
    tail = _tail_sums(values)[..., 1:]
    return torch.where(total > 0, 1.0 - tail / torch.where(total > 0, total, 1.0), 0.0)


def rank_from_energy(
    energy: Tensor, threshold: float, min_rank: int = 1, max_rank: int | Tensor | None = None
) -> Tensor:
    """Read the rank off a (possibly averaged) energy curve: k = min{m : E(m) ≥ τ}, clamped.

    Source: paper § 'dynamic rank'; averaging the curve first is a paper option.

    Args:
        energy: E(1) … E(r), `[L, r]`; all zero where nothing is known.
        threshold: τ in (0, 1].
        min_rank: Lower bound, 0 ≤ min_rank ≤ r.
        max_rank: Upper bound, an int or `[L]`; None means r.

    Returns:
        Ranks, int64 `[L]`.

    Raises:
        ValueError: τ outside (0, 1] or bounds that do not fit.

    Example:
        >>> rank_from_energy(torch.tensor([[0.6, 0.9, 1.0]]), threshold=0.8)
        tensor([2])
    """
    check_spectrum("energy", energy)
    check_fraction("threshold", threshold, open_left=True)
    limit = check_rank_limits(min_rank, max_rank, energy.shape[-1])
    return _clamp((energy < threshold - _slack(energy)).sum(dim=-1) + 1, min_rank, limit)


def energy_rank(values: Tensor, threshold: float, min_rank: int = 1, max_rank: int | Tensor | None = None) -> Tensor:
    """Apply the paper's rank rule: k = min{m : Σ_{i≤m} λ_i / Σ_i λ_i ≥ τ}, min_rank ≤ k ≤ max_rank.

    τ = 1 gives the numerical rank. An all-zero spectrum gives max_rank.

    Source: paper § 'dynamic rank'.

    Args:
        values: Descending spectra `[L, r]`.
        threshold: τ in (0, 1].
        min_rank: Lower bound (the paper's min_lora_rank), 0 ≤ min_rank ≤ r.
        max_rank: Upper bound, an int or `[L]`; None means r.

    Returns:
        Ranks, int64 `[L]`.

    Raises:
        ValueError: τ outside (0, 1] or bounds that do not fit.

    Example:
        >>> energy_rank(torch.tensor([[6.0, 3.0, 1.0], [0.0, 0.0, 0.0]]), threshold=0.9)
        tensor([2, 3])
    """
    return rank_from_energy(cumulative_energy(values), threshold, min_rank, max_rank)


def rank_with_hysteresis(current: Tensor, strict: Tensor, plain: Tensor, loose: Tensor) -> Tensor:
    """Move a rank only as far as a rule asks for with some margin to spare.

    It falls to what the strict answer allows, rises to what the plain one wants if even the loose one wants more than
    there is, and otherwise stays.

    Source: paper § 'dynamic rank' (hysteresis).

    Args:
        current: Ranks in force, int64 `[L]`.
        strict: Ranks that a rule wants at its threshold plus a margin, int64 `[L]`.
        plain: Ranks that it wants at its threshold, at most `strict`.
        loose: Ranks that it wants at its threshold less the margin, at most `plain`.

    Returns:
        Ranks, int64 `[L]`.

    Example:
        >>> strict, plain, loose = torch.tensor([[2, 4, 6], [2, 2, 5], [1, 2, 4]])
        >>> rank_with_hysteresis(torch.tensor([4, 3, 2]), strict, plain, loose)
        tensor([2, 3, 5])
    """
    return torch.where(loose > current, torch.maximum(plain, current), torch.minimum(strict, current))


def energy_rank_with_hysteresis(
    energy: Tensor,
    current: Tensor,
    threshold: float,
    hysteresis: float,
    min_rank: int = 1,
    max_rank: int | Tensor | None = None,
) -> Tensor:
    """Apply the energy rule with a dead band, so that a curve trembling around τ does not move the rank.

    `rank_with_hysteresis` of the ranks at τ + ε (cut at 1), τ and τ − ε: lowered to min{m : E(m) ≥ τ + ε} when that is
    below the current rank, raised to min{m : E(m) ≥ τ} when E(current) < τ − ε, else kept. ε = 0 is `energy_rank`,
    except that a layer without evidence keeps its rank.

    Source: paper § 'dynamic rank' (hysteresis).

    Args:
        energy: E(1) … E(r), `[L, r]`; all zero where nothing is known.
        current: Ranks in force, int64 `[L]`.
        threshold: τ in (0, 1].
        hysteresis: ε in [0, 1].
        min_rank: Lower bound, 0 ≤ min_rank ≤ r.
        max_rank: Upper bound, an int or `[L]`; None means r.

    Returns:
        Ranks, int64 `[L]`.

    Raises:
        ValueError: τ outside (0, 1], ε outside [0, 1], or ranks that do not fit.

    Example:
        >>> curve = torch.tensor([[0.6, 0.91, 1.0]])
        >>> energy_rank_with_hysteresis(curve, torch.tensor([3]), threshold=0.9, hysteresis=0.05)
        tensor([3])
    """
    check_fraction("hysteresis", hysteresis)
    check_rank("current", current, energy.shape[-1])
    limit = check_rank_limits(min_rank, max_rank, energy.shape[-1])
    current = current.to(energy.device, torch.int64)
    strict = rank_from_energy(energy, min(threshold + hysteresis, 1.0), min_rank, max_rank)
    plain = rank_from_energy(energy, threshold, min_rank, max_rank)
    # Rank 0 holds no energy. It is enough here if τ ≤ ε, so that no bound may lift this answer above it.
    from_zero = torch.cat([energy.new_zeros(len(energy), 1), energy], dim=-1)
    loose = (from_zero < threshold - hysteresis - _slack(energy)).sum(dim=-1)
    proposed = rank_with_hysteresis(current, strict, plain, loose)
    known = energy[..., -1] > 0
    return _clamp(torch.where(known, proposed, current), min_rank, limit)


def budget_rank(
    sigma: Tensor, budget: float | Tensor, min_rank: int = 1, max_rank: int | Tensor | None = None
) -> Tensor:
    """Return the smallest rank whose predicted loss increase stays within a trust region: ½ Σ_{i>k} σ_i² ≤ budget.

    Source: beyond the paper.

    Args:
        sigma: Balanced spectra, descending `[L, r]`.
        budget: Allowed increase of the loss per layer (nats per token), a float or `[L]`, ≥ 0.
        min_rank: Lower bound, 0 ≤ min_rank ≤ r.
        max_rank: Upper bound, an int or `[L]`; None means r.

    Returns:
        Ranks, int64 `[L]`; max_rank for an all-zero spectrum.

    Raises:
        ValueError: A negative budget or bounds that do not fit.

    Example:
        >>> budget_rank(torch.tensor([[3.0, 2.0, 1.0]]), budget=0.5)
        tensor([2])
    """
    check_spectrum("sigma", sigma)
    if not isinstance(budget, Tensor):
        check_not_negative("budget", budget)
    limit = check_rank_limits(min_rank, max_rank, sigma.shape[-1])
    squares = _denoised(sigma).square()
    cost = 0.5 * _tail_sums(squares)
    allowed = torch.as_tensor(budget, dtype=cost.dtype, device=cost.device).reshape(-1, 1) * (1.0 + _slack(sigma))
    ranks = (cost[..., :-1] > allowed).sum(dim=-1)
    return _clamp(torch.where(cost[..., 0] > 0, ranks, sigma.shape[-1]), min_rank, limit)


def entropy_floor_rank(values: Tensor, min_rank: int = 1, max_rank: int | Tensor | None = None) -> Tensor:
    """Return a lower bound on the rank that guards against collapse: ⌈exp(H)⌉, H the entropy of the normalised spectrum.

    Source: paper § 'could dynamic rank collapse' (spectral entropy is monitored; the bound is ours).

    Args:
        values: Descending spectra `[L, r]`.
        min_rank: Lower bound, 0 ≤ min_rank ≤ r.
        max_rank: Upper bound, an int or `[L]`; None means r.

    Returns:
        Ranks, int64 `[L]`; max_rank for an all-zero spectrum.

    Raises:
        ValueError: Bounds that do not fit.

    Example:
        >>> entropy_floor_rank(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
        tensor([2])
    """
    check_spectrum("values", values)
    r = values.shape[-1]
    limit = check_rank_limits(min_rank, max_rank, r)
    values = _denoised(values)
    total = values.sum(dim=-1)
    share = values / torch.where(total > 0, total, 1.0).unsqueeze(-1)
    directions = torch.special.entr(share).sum(dim=-1).exp()
    ranks = torch.where(total > 0, (directions - r * _slack(values)).ceil(), r)
    return _clamp(ranks.to(torch.int64), min_rank, limit)


def subspace_mixing_mask(
    k: int | Tensor, r: int, probability: float, generator: torch.Generator | None = None
) -> Tensor:
    """Mask one of a layer's k kept directions, chosen evenly, with probability p (stochastic subspace mixing).

    A layer with fewer than two directions keeps them. Pass the mask where a reprojection takes k. Every process must
    draw the same numbers: seed the generators alike. The numbers are drawn on the generator's device.

    Source: paper, table of failure modes (stochastic subspace mixing).

    Args:
        k: Ranks `[L]` or one int for a single layer.
        r: The adapter's rank.
        probability: p in [0, 1].
        generator: Source of randomness; None takes torch's global one.

    Returns:
        Coordinates to keep, bool `[L, r]`, on the device of `k`.

    Raises:
        ValueError: p outside [0, 1] or a rank outside [0, r].

    Example:
        >>> subspace_mixing_mask(torch.tensor([3]), 4, probability=0.0)
        tensor([[ True,  True,  True, False]])
    """
    check_fraction("probability", probability)
    kept = rank_mask(k, r)
    ranks = kept.sum(dim=-1)
    device = torch.device("cpu") if generator is None else generator.device
    draws = torch.rand(2, len(kept), generator=generator, device=device, dtype=torch.float64).to(kept.device)
    chosen = (draws[1] * ranks).long()
    dropped = (draws[0] < probability) & (ranks > 1)
    index = torch.arange(r, device=kept.device)
    return kept & ~(dropped.unsqueeze(-1) & (index == chosen.unsqueeze(-1)))


def _tail_sums(values: Tensor) -> Tensor:
    """Return Σ_{i>m} values_i for m = 0 … r, `[..., r + 1]`, summed from the small end."""
    tail = values.flip(-1).cumsum(dim=-1).flip(-1)
    return torch.cat([tail, torch.zeros_like(tail[..., :1])], dim=-1)


def _slack(values: Tensor) -> float:
    """Return the rounding error of a sum over a spectrum, relative to its total."""
    return values.shape[-1] * torch.finfo(working(values).dtype).eps


def _denoised(values: Tensor) -> Tensor:
    """Set to zero what an eigensolver cannot tell from zero."""
    values = working(values)
    return torch.where(values > _slack(values) * values.amax(dim=-1, keepdim=True), values, 0.0)


def _clamp(ranks: Tensor, min_rank: int, limit: int | Tensor) -> Tensor:
    """Clamp ranks to [min_rank, limit], int64."""
    return torch.minimum(ranks.clamp(min=min_rank), torch.as_tensor(limit, device=ranks.device)).to(torch.int64)
