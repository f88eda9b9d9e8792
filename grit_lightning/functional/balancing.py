"""Balanced truncation: the cut of an adapter that costs the least predicted loss, in a gauge that both factors share.

Notation as in `reprojection`; σ `[L, r]` are the singular values of Σ_g^½ Σ_a^½, descending; T the change of gauge in
which both factors are diag(σ), so that dropping direction i costs ½ σ_i² and nothing else.
"""

import torch
from torch import Tensor

from grit_lightning.functional._common import check_fraction, check_spectrum, working
from grit_lightning.functional.reprojection import (
    ReprojectionMaps,
    _blended,
    _check_pair,
    _fix_signs,
    _kept,
    eigenbasis,
)

BALANCING_FLOOR = 1e-6
"""Smallest eigenvalue, relative to the largest, that the balancing transform takes at its word: just above the rounding
noise of a float32 covariance. It bounds the transform's condition number by 1e3."""


def balancing_transform(
    a_cov: Tensor, g_cov: Tensor, floor: float = BALANCING_FLOOR, preserve_volume: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the change of gauge in which both factors are the same diagonal: T Σ_a Tᵀ = T⁻ᵀ Σ_g T⁻¹ = diag(σ).

    Σ_a = L Lᵀ, Lᵀ Σ_g L = V S² Vᵀ, T = S^½ Vᵀ L⁻¹ (balanced truncation). σ are the singular values of Σ_g^½ Σ_a^½;
    they do not depend on the gauge, unlike the eigenvalues of either factor.

    For T alone the eigenvalues of each factor are lifted to `floor` times the largest, and a factor that is zero
    (Σ_g at B = 0) stands as its partner's mean eigenvalue times the identity. So T is finite, its condition number is
    at most floor^−½, and T T⁻¹ = I whatever the factors are; σ is that of the factors as they came. Runs in float64.

    Source: beyond the paper.

    Args:
        a_cov: Σ_a `[L, r, r]`.
        g_cov: Σ_g `[L, r, r]`.
        floor: Relative floor on the eigenvalues that build T, in (0, 1].
        preserve_volume: Divide T by |det T|^(1/r). Early in training Σ_g is far smaller than Σ_a, and T shrinks A and
            grows B by the fourth root of their ratio, which an optimizer with a fixed step length feels; this keeps
            the mean scale of both. The factors then become c²·diag(σ) and diag(σ)/c².

    Returns:
        T `[L, r, r]`, T⁻¹ `[L, r, r]` and σ descending `[L, r]`, in the dtype of the factors (float32 or better).

    Raises:
        ValueError: The shapes differ or `floor` lies outside (0, 1].

    Example:
        >>> t, t_inverse, sigma = balancing_transform(torch.diag(torch.tensor([4.0, 1.0]))[None], torch.eye(2)[None])
        >>> sigma[0]
        tensor([2., 1.])
    """
    _check_pair(a_cov, g_cov)
    check_fraction("floor", floor, open_left=True)
    dtype = torch.promote_types(working(a_cov).dtype, working(g_cov).dtype)
    a_values, a_vectors = eigenbasis(a_cov.double())
    g_values, g_vectors = eigenbasis(g_cov.double())
    # Square roots L (Σ = L Lᵀ), as they came and lifted.
    sigma = torch.linalg.svdvals(
        (g_vectors * g_values.sqrt().unsqueeze(-2)).mT @ (a_vectors * a_values.sqrt().unsqueeze(-2))
    )
    a_root = _lift(a_values, g_values, floor).sqrt().unsqueeze(-2)
    g_root = _lift(g_values, a_values, floor).sqrt().unsqueeze(-2)
    a_factor = a_vectors * a_root
    _, s, v_t = torch.linalg.svd((g_vectors * g_root).mT @ a_factor)
    v = _fix_signs(v_t.mT)
    scale = s.sqrt()
    if preserve_volume:
        scale = scale / (scale.log() - a_root.squeeze(-2).log()).mean(dim=-1, keepdim=True).exp()
    t = scale.unsqueeze(-1) * (v.mT @ (a_vectors / a_root).mT)
    t_inverse = (a_factor @ v) / scale.unsqueeze(-2)
    return t.to(dtype), t_inverse.to(dtype), sigma.to(dtype)


def balanced_maps(
    a_cov: Tensor, g_cov: Tensor, k: int | Tensor, blend: float = 1.0, preserve_volume: bool = False
) -> ReprojectionMaps:
    """Truncate in the balanced gauge: a_map = T, b_map = T⁻¹((1−γ)I + γD_k), the cheapest rank-k cut under F.

    Only the columns of B beyond k are cut; the rows of A stay, so a dropped direction contributes nothing yet still
    receives gradient and can come back.

    Source: beyond the paper.

    Args:
        a_cov: Σ_a `[L, r, r]`.
        g_cov: Σ_g `[L, r, r]`.
        k: Ranks `[L]` or one int; or the coordinates to keep, bool `[L, r]`.
        blend: γ in [0, 1]; 1 drops the directions beyond k.
        preserve_volume: Keep the mean scale of A and B; see `balancing_transform`.

    Returns:
        The maps.

    Raises:
        ValueError: The shapes differ, a rank lies outside [0, r] or γ outside [0, 1].

    Example:
        >>> maps = balanced_maps(torch.eye(2)[None], torch.diag(torch.tensor([16.0, 1.0]))[None], 2)
        >>> maps.a_map[0], maps.b_map[0]
        (tensor([[2., 0.],
                [0., 1.]]), tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]]))
    """
    t, t_inverse, _ = balancing_transform(a_cov, g_cov, preserve_volume=preserve_volume)
    return ReprojectionMaps(t, t_inverse * _blended(k, t, blend).unsqueeze(-2))


def truncation_cost(sigma: Tensor, k: int | Tensor) -> Tensor:
    """Predict the loss increase of a balanced cut at rank k: ½ Σ_{i>k} σ_i², the least that any rank-k choice can cost.

    Source: beyond the paper.

    Args:
        sigma: Balanced spectrum, descending `[L, r]`.
        k: Ranks `[L]` or one int; or the coordinates to keep, bool `[L, r]`.

    Returns:
        The cost in units of the loss (summed over nothing: per token), `[L]`.

    Raises:
        ValueError: A rank lies outside [0, r].

    Example:
        >>> truncation_cost(torch.tensor([[3.0, 2.0, 1.0]]), 1)
        tensor([2.5000])
    """
    check_spectrum("sigma", sigma)
    return 0.5 * working(sigma).square().masked_fill(_kept(k, sigma), 0.0).sum(dim=-1)


def _lift(values: Tensor, partner: Tensor, floor: float) -> Tensor:
    """Lift eigenvalues to `floor` times the largest; a zero spectrum becomes its partner's mean, or one."""
    mean = partner.mean(dim=-1, keepdim=True)
    neutral = torch.where(mean > 0, mean, 1.0)
    largest = values.amax(dim=-1, keepdim=True)
    return torch.where(largest > 0, torch.maximum(values, floor * largest), neutral)
