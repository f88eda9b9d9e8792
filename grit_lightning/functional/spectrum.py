"""Geometry telemetry: what a spectrum, a subspace or an update looks like, as numbers to log.

Notation: values `[L, r]` is a descending, nonnegative spectrum (eigenvalues of a factor, or singular values where
said); U, V `[L, r, r]` orthonormal columns, U_k the first k; Σ_a, Σ_g `[L, r, r]`. Every function returns one
number per layer, `[L]`, without leaving the device.

Nothing in a training run calls `stable_rank`, `condition_number`, `alignment`, `curvature_exposure`,
`projected_curvature`, `tail_mass`, `sparsity`, `direction_jitter`, `covariance_variance` and `coefficient_of_variation`
yet: they are there for dashboards and reports.
"""

import torch
from torch import Tensor

from grit_lightning.functional._common import (
    check_not_negative,
    check_rank,
    check_spectrum,
    check_square,
    norm,
    working,
)
from grit_lightning.functional.rank import energy_rank


def effective_rank(values: Tensor, eta: float = 0.99) -> Tensor:
    """Count the directions that hold a share η of the energy: r_eff = min{m : E(m) ≥ η}.

    Source: paper § 'geometry telemetry'.

    Args:
        values: Descending spectra `[L, r]`.
        eta: η in (0, 1].

    Returns:
        int64 `[L]`; r for an all-zero spectrum.

    Raises:
        ValueError: η outside (0, 1].

    Example:
        >>> effective_rank(torch.tensor([[6.0, 3.0, 1.0]]), eta=0.9)
        tensor([2])
    """
    return energy_rank(values, eta)


def participation_ratio(values: Tensor) -> Tensor:
    """Count the directions that take part: (Σσ)² / Σσ², between 1 and r; zero for an all-zero spectrum.

    Source: paper, appendix (effective rank trajectory).

    Args:
        values: Spectra `[L, r]`.

    Returns:
        `[L]`.

    Example:
        >>> participation_ratio(torch.tensor([[2.0, 2.0, 0.0]]))
        tensor([2.])
    """
    shares = _shares(values)
    squares = shares.square().sum(dim=-1)
    return torch.where(squares > 0, 1.0 / torch.where(squares > 0, squares, 1.0), 0.0)


def spectral_entropy(values: Tensor) -> Tensor:
    """Return the entropy of the normalised spectrum, −Σ p_i log p_i with p = values/Σvalues, in nats; zero for an all-zero one.

    Source: paper § 'geometry telemetry'.

    Args:
        values: Spectra `[L, r]`.

    Returns:
        `[L]`, between 0 and log r.

    Example:
        >>> spectral_entropy(torch.tensor([[1.0, 1.0, 0.0]]))
        tensor([0.6931])
    """
    entropy: Tensor = torch.special.entr(_shares(values)).sum(dim=-1)
    return entropy


def stable_rank(values: Tensor) -> Tensor:
    """Return a rank that ignores small directions: ‖M‖²_F / ‖M‖²_2 = Σσ² / σ_1²; zero for an all-zero spectrum.

    Source: paper § 'geometry telemetry'.

    Args:
        values: Singular values `[L, r]`, descending (the roots of a covariance's eigenvalues).

    Returns:
        `[L]`, between 1 and r.

    Example:
        >>> stable_rank(torch.tensor([[2.0, 1.0]]))
        tensor([1.2500])
    """
    check_spectrum("values", values)
    values = working(values)
    top = values.amax(dim=-1, keepdim=True)
    return (values / torch.where(top > 0, top, 1.0)).square().sum(dim=-1)


def condition_number(values: Tensor, damping: float | Tensor = 0.0) -> Tensor:
    """Return (λ_1 + λ) / (λ_r + λ) of a damped factor; infinite when the smallest is zero, NaN when all are.

    Source: beyond the paper.

    Args:
        values: Descending eigenvalues `[L, r]`.
        damping: λ, a number or `[L]`.

    Returns:
        `[L]`.

    Example:
        >>> condition_number(torch.tensor([[4.0, 1.0]]), damping=1.0)
        tensor([2.5000])
    """
    check_spectrum("values", values)
    values = working(values)
    return (values[:, 0] + damping) / (values[:, -1] + damping)


def mass_ratio(values: Tensor, k: int | Tensor) -> Tensor:
    """Return the share of the spectrum in the first k directions (retained mass π_proj): Σ_{i≤k} λ_i / Σ λ_i.

    Source: paper § 'neural reprojection' (adaptive cadence) and the forgetting law's π_proj.

    Args:
        values: Descending spectra `[L, r]`.
        k: Ranks `[L]` or one int.

    Returns:
        `[L]`; zero for an all-zero spectrum.

    Raises:
        ValueError: A rank lies outside [0, r].

    Example:
        >>> mass_ratio(torch.tensor([[6.0, 3.0, 1.0]]), 2)
        tensor([0.9000])
    """
    check_rank("k", k, values.shape[-1])
    return _shares(values).masked_fill(~_first(k, values), 0.0).sum(dim=-1)


def alignment(u: Tensor, v: Tensor, k: int | Tensor) -> Tensor:
    """Measure the overlap of two k-dimensional subspaces: ρ_align = ‖U_kᵀ V_k‖²_F / k, 1 when equal, k/r when random.

    Source: paper § 'forgetting' (ρ_align).

    Args:
        u: Orthonormal columns `[L, n, r]`.
        v: Orthonormal columns `[L, n, r]`.
        k: Ranks ≥ 1, `[L]` or one int.

    Returns:
        `[L]` in [0, 1].

    Raises:
        ValueError: A rank lies outside [1, r].

    Example:
        >>> alignment(torch.eye(2)[None], torch.eye(2)[None].flip(-1), 1)
        tensor([0.])
    """
    check_rank("k", k, u.shape[-1], lowest=1)
    keep = _first(k, u)
    cosines = (u * keep.unsqueeze(-2)).mT @ (v * keep.unsqueeze(-2))
    return cosines.square().sum(dim=(-2, -1)) / keep.sum(dim=-1)


def principal_angle_drift(u1: Tensor, u2: Tensor, k: int | Tensor) -> Tensor:
    """Measure how far a top-k subspace has turned: the sine of the largest principal angle, ‖(I − P_1) U_{2,k}‖_2.

    0 when the subspaces agree, 1 when some direction of one is orthogonal to the other. Taken from the residual
    rather than from arccos of the cosines, which loses half the digits near zero.

    Source: paper appendix J, D3.

    Args:
        u1: Orthonormal columns at the earlier time `[L, r, r]`.
        u2: Orthonormal columns at the later time `[L, r, r]`.
        k: Ranks ≥ 1, `[L]` or one int.

    Returns:
        `[L]` in [0, 1].

    Raises:
        ValueError: A rank lies outside [1, r].

    Example:
        >>> principal_angle_drift(torch.eye(2)[None], torch.eye(2)[None].flip(-1), 1)
        tensor([1.])
    """
    check_rank("k", k, u1.shape[-1], lowest=1)
    keep = _first(k, u1).unsqueeze(-2)
    top1, top2 = u1 * keep, u2 * keep
    residual = top2 - top1 @ (top1.mT @ top2)
    sine: Tensor = torch.linalg.matrix_norm(residual, ord=2)
    return sine.clamp(max=1.0)


def curvature_exposure(a_cov: Tensor, g_cov: Tensor, delta: Tensor | None = None) -> Tensor:
    """Measure the curvature that a rank-space update meets: ‖Σ_g^½ Δ Σ_a^½‖²_F = tr(Δᵀ Σ_g Δ Σ_a).

    Δ = I is the adapter as a whole: tr(Σ_g Σ_a) = Σσ_i², the same in every gauge. Also the curvature regulariser.

    Source: paper § 'objective view' and § 'geometry telemetry'.

    Args:
        a_cov: Σ_a `[L, r, r]`.
        g_cov: Σ_g `[L, r, r]`.
        delta: Δ `[L, r, r]`; None for the identity.

    Returns:
        `[L]`, differentiable in Δ.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> curvature_exposure(torch.eye(2)[None], 3 * torch.eye(2)[None])
        tensor([6.])
    """
    check_square("a_cov", a_cov)
    if g_cov.shape != a_cov.shape:
        raise ValueError(f"g_cov: expected the shape of a_cov {tuple(a_cov.shape)}, got {tuple(g_cov.shape)}")
    a_cov, g_cov = working(a_cov), working(g_cov)
    if delta is None:
        return (g_cov * a_cov.mT).sum(dim=(-2, -1))
    delta = working(delta)
    return ((g_cov @ delta) * (delta @ a_cov)).sum(dim=(-2, -1))


def projected_curvature(cov: Tensor, projector: Tensor) -> Tensor:
    """Measure the curvature inside a subspace: tr(P Σ P).

    Source: paper § 'geometry telemetry'.

    Args:
        cov: Σ `[L, r, r]`.
        projector: Orthogonal projectors P `[L, r, r]`.

    Returns:
        `[L]`.

    Example:
        >>> projected_curvature(torch.diag(torch.tensor([3.0, 1.0]))[None], torch.diag(torch.tensor([1.0, 0.0]))[None])
        tensor([3.])
    """
    check_square("cov", cov)
    return (projector @ working(cov) @ projector).diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def tail_mass(delta: Tensor, t: float) -> Tensor:
    """Count the large coordinates of an update: #{|ΔW_ij| > t}.

    Source: paper § 'introduction' (tail mass of updates).

    Args:
        delta: Updates `[L, ...]`.
        t: Magnitude threshold, ≥ 0, in the units of the weights.

    Returns:
        Counts, int64 `[L]`.

    Raises:
        ValueError: A negative threshold.

    Example:
        >>> tail_mass(torch.tensor([[0.5, -2.0, 3.0]]), t=1.0)
        tensor([2])
    """
    check_not_negative("t", t)
    return (delta.abs() > t).flatten(1).sum(dim=1)


def sparsity(delta: Tensor, t: float = 0.0) -> Tensor:
    """Return the share of an update's coordinates that do not exceed t in magnitude.

    Source: paper § 'geometry telemetry' (update sparsity).

    Args:
        delta: Updates `[L, ...]`.
        t: Magnitude threshold, ≥ 0, in the units of the weights.

    Returns:
        `[L]` in [0, 1].

    Raises:
        ValueError: A negative threshold.

    Example:
        >>> sparsity(torch.tensor([[0.0, -2.0]]))
        tensor([0.5000])
    """
    return 1.0 - tail_mass(delta, t) / delta[0].numel()


def direction_jitter(current: Tensor, previous: Tensor) -> Tensor:
    """Measure how much an update direction has turned: 1 − cos(d_t, d_{t−1}); zero where either is zero.

    Source: paper appendix J, D4.

    Args:
        current: Directions `[L, ...]`.
        previous: Directions one step earlier, same shape.

    Returns:
        `[L]` in [0, 2].

    Example:
        >>> direction_jitter(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]))
        tensor([2.])
    """
    lengths = norm(current) * norm(previous)
    inner = (working(current) * working(previous)).flatten(1).sum(dim=1)
    return torch.where(lengths > 0, 1.0 - inner / torch.where(lengths > 0, lengths, 1.0), 0.0)


def covariance_variance(window: Tensor) -> Tensor:
    """Return the variance of a factor's estimate over a window: mean_t ‖Σ_t − mean Σ‖²_F.

    Source: paper appendix J, D1.

    Args:
        window: The last W estimates `[W, L, r, r]`.

    Returns:
        `[L]`.

    Example:
        >>> covariance_variance(torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1))
        tensor([1.])
    """
    window = working(window)
    return (window - window.mean(dim=0)).square().sum(dim=(-2, -1)).mean(dim=0)


def coefficient_of_variation(window: Tensor) -> Tensor:
    """Return the standard deviation over the mean of each eigenvalue in a window; zero where the mean is.

    Source: paper appendix J, D2.

    Args:
        window: The last W spectra `[W, L, k]`.

    Returns:
        `[L, k]`, one number per eigenvalue.

    Example:
        >>> coefficient_of_variation(torch.tensor([1.0, 3.0]).reshape(2, 1, 1))
        tensor([[0.5000]])
    """
    window = working(window)
    mean = window.mean(dim=0)
    deviation = (window - mean).square().mean(dim=0).sqrt()
    return torch.where(mean > 0, deviation / torch.where(mean > 0, mean, 1.0), 0.0)


def _shares(values: Tensor) -> Tensor:
    """Divide spectra by their sum; zero where the sum is."""
    check_spectrum("values", values)
    values = working(values)
    total = values.sum(dim=-1, keepdim=True)
    return values / torch.where(total > 0, total, 1.0)


def _first(k: int | Tensor, like: Tensor) -> Tensor:
    """Mark the first k of the last dimension, bool `[L, r]` on the device of `like`."""
    ranks = torch.as_tensor(k, device=like.device).reshape(-1, 1)
    return (torch.arange(like.shape[-1], device=like.device) < ranks).expand(like.shape[0], -1)
