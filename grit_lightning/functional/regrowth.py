"""Which dropped direction of an adapter should return: what its gradient says, since its curvature cannot.

Notation as in `reprojection`; K the first k coordinates, D the rest. Where a cut zeroed B's columns D but kept A's
rows, g_D = s·B_Dᵀδ is zero: Σ_g and every σ say that the direction is worth nothing, however the data change. Yet B's
gradient there, ∇B_D = s·δ a_Dᵀ, is not zero, and autograd computes it anyway. With M = E[∇Bᵀ∇B] `[L, r, r]` over
steps and F ≈ E[δδᵀ] ⊗ Σ_a for B, the loss that a natural-gradient step on B can win is, for δ alike in all outputs,
proportional to tr(Σ_a⁻¹M). Its K block is what the kept directions win; what D adds is the Schur complement

    a_D|K = J a,  J = [−Σ_DK Σ_KK⁻¹, I],  S = J Σ_a Jᵀ,  gains = eigenvalues of S^−½ (J M Jᵀ) S^−½.

Both are the same in every gauge that leaves the kept subspace where it is. For gradients that are only noise,
independent of a, M ∝ Σ_a and every gain equals the kept mean.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from grit_lightning.functional._common import check_rank, check_square
from grit_lightning.functional.balancing import BALANCING_FLOOR
from grit_lightning.functional.reprojection import (
    ReprojectionMaps,
    _fix_signs,
    eigenbasis,
    rank_mask,
)


class Regrowth(NamedTuple):
    """Dropped directions in the order of what they would win."""

    maps: ReprojectionMaps
    """A rotation of the dropped coordinates, exact in every respect, which puts the one with the largest gain first."""
    gain: Tensor
    """`[L, r]`: gain of the direction at each coordinate under `maps`, relative to the mean over kept directions;
    zero at kept coordinates, and where nothing has been observed."""


def regrowth(a_cov: Tensor, gradient_gram: Tensor, k: Tensor) -> Regrowth:
    """Order the dropped directions by the gain that B's gradient promises. Runs in float64.

    Source: beyond the paper (which says that dropped directions 'can re-enter', but not what would tell).

    Args:
        a_cov: Σ_a `[L, r, r]`.
        gradient_gram: M = E[∇Bᵀ∇B] up to a factor per layer, over raw gradients, `[L, r, r]`.
        k: Ranks in force, int64 `[L]`, each ≥ 1.

    Returns:
        The maps and gains, in the dtype of Σ_a.

    Raises:
        ValueError: The shapes differ or a rank lies outside [1, r].

    Example:
        >>> gram = torch.diag(torch.tensor([1.0, 0.5, 4.0]))[None]
        >>> found = regrowth(torch.eye(3)[None], gram, torch.tensor([1]))
        >>> found.gain[0], found.maps.a_map[0, 1].abs()
        (tensor([0.0000, 4.0000, 0.5000]), tensor([0., 0., 1.]))
    """
    check_square("a_cov", a_cov)
    if gradient_gram.shape != a_cov.shape:
        raise ValueError(
            f"gradient_gram: expected the shape of a_cov {tuple(a_cov.shape)}, got {tuple(gradient_gram.shape)}"
        )
    r = a_cov.shape[-1]
    check_rank("k", k, r, lowest=1)
    k = k.to(a_cov.device)
    kept = rank_mask(k, r)
    a, m = _unit_trace(a_cov.double()), _unit_trace(gradient_gram.double())  # every result is a ratio
    identity = torch.eye(r, dtype=a.dtype, device=a.device)
    floor = BALANCING_FLOOR * eigenbasis(a)[0][:, :1]

    kept_root = _inverse_root(a, kept, floor)
    kept_gain = ((kept_root @ m @ kept_root).diagonal(dim1=-2, dim2=-1).sum(-1) / k).unsqueeze(-1)
    residual = identity - (~kept).unsqueeze(-1) * (a @ kept_root @ kept_root)
    dropped_root = _inverse_root(residual @ a @ residual.mT, ~kept, floor)
    whitened = dropped_root @ (residual @ m @ residual.mT) @ dropped_root
    # Gains are nonnegative, so that −1 on the kept block sorts it behind all of them.
    values, vectors = torch.linalg.eigh(whitened - torch.diag_embed(kept.double()))
    values, vectors = values.flip(-1), vectors.flip(-1)

    # From whitened directions to coefficients of A's rows. Only their order of importance is taken, by orthogonalising:
    # rows scaled to unit activation would be huge where the data so far hardly have any, and dangerous when they do.
    rotation = _fix_signs(torch.linalg.qr((dropped_root + torch.diag_embed(kept.double())) @ vectors).Q)
    order = (torch.arange(r, device=k.device) - k.unsqueeze(-1)).clamp(min=0)
    rows = rotation.mT.gather(1, order.unsqueeze(-1).expand_as(rotation))
    observed = (kept_gain > 0) & ~kept
    a_map = torch.where(observed.unsqueeze(-1), rows, identity)
    gain = values.gather(1, order).clamp(min=0) / torch.where(kept_gain > 0, kept_gain, 1.0)
    dtype = a_cov.dtype
    maps = ReprojectionMaps(a_map.to(dtype), a_map.mT.to(dtype))
    return Regrowth(maps, torch.where(observed, gain, 0.0).to(dtype))


def _unit_trace(matrices: Tensor) -> Tensor:
    """Divide each matrix by its trace; zero stays zero."""
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1)
    return matrices / torch.where(trace > 0, trace, 1.0)


def _inverse_root(cov: Tensor, block: Tensor, floor: Tensor) -> Tensor:
    """Return Σ^−½ of the block `[L, r]` marks, zero outside it, with eigenvalues lifted to `floor` `[L, 1]`."""
    outer = block.unsqueeze(-1) & block.unsqueeze(-2)
    values, vectors = eigenbasis(cov.masked_fill(~outer, 0.0))
    lifted = torch.maximum(values, floor)
    root = torch.where(lifted > 0, lifted, 1.0).rsqrt()
    return ((vectors * root.unsqueeze(-2)) @ vectors.mT).masked_fill(~outer, 0.0)
