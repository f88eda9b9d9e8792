"""What must follow the factors through a reprojection A ← a_map A, B ← B b_map.

Notation as in `reprojection`. For the same token (x, δ) the new rank-space vectors are a' = a_map a and
g' = s·(B b_map)ᵀδ = b_mapᵀ g; statistics and optimizer moments follow from these two. Exact while δ is unchanged, that
is while the reprojection leaves ΔW as it was; close to it otherwise.
"""

from typing import NamedTuple, overload

from torch import Tensor

from grit_lightning.functional.covariance import symmetrize
from grit_lightning.functional.reprojection import ReprojectionMaps


def carry_covariances(a_cov: Tensor, g_cov: Tensor, maps: ReprojectionMaps) -> tuple[Tensor, Tensor]:
    """Carry covariances through a reprojection: Σ_a ← a_map Σ_a a_mapᵀ, Σ_g ← b_mapᵀ Σ_g b_map, as a' = a_map a, g' = b_mapᵀ g.

    Exact for the same x and δ. Linear, hence right for Gram sums as well as for averages.

    Source: beyond the paper.

    Args:
        a_cov: Σ_a (or its Gram sum) `[L, r, r]`.
        g_cov: Σ_g (or its Gram sum) `[L, r, r]`.
        maps: The reprojection.

    Returns:
        Symmetric (Σ_a, Σ_g) of the new factors.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1, 1)
        >>> maps = ReprojectionMaps(a_map=2 * one, b_map=one / 2)
        >>> [cov.item() for cov in carry_covariances(one, one, maps)]
        [4.0, 0.25]
    """
    a_map, b_map = maps
    return symmetrize(a_map @ a_cov @ a_map.mT), symmetrize(b_map.mT @ g_cov @ b_map)


class GradientMaps(NamedTuple):
    """How gradients follow a reprojection: ∇A ← left ∇A, ∇B ← ∇B right."""

    left: Tensor
    """b_mapᵀ `[L, r, r]`."""
    right: Tensor
    """a_mapᵀ `[L, r, r]`."""


def gradient_maps(maps: ReprojectionMaps) -> GradientMaps:
    """Return the maps of the gradients that belong to maps of the factors: ∇A ← b_mapᵀ ∇A, ∇B ← ∇B a_mapᵀ.

    For the same x and δ, ∇A' = (s·B'ᵀδ)xᵀ = b_mapᵀ ∇A and ∇B' = s·δ(A'x)ᵀ = ∇B a_mapᵀ.

    Source: beyond the paper.

    Args:
        maps: The reprojection.

    Returns:
        The maps of the gradients.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1, 1)
        >>> maps = ReprojectionMaps(a_map=2 * one, b_map=one / 2)
        >>> [m.item() for m in gradient_maps(maps)]
        [0.5, 2.0]
    """
    return GradientMaps(maps.b_map.mT, maps.a_map.mT)


@overload
def carry_first_moment(
    m_a: Tensor, m_b: Tensor, maps: ReprojectionMaps, *, preconditioned: bool = False
) -> tuple[Tensor, Tensor]: ...


@overload
def carry_first_moment(
    m_a: Tensor | None, m_b: Tensor | None, maps: ReprojectionMaps, *, preconditioned: bool = False
) -> tuple[Tensor | None, Tensor | None]: ...


def carry_first_moment(
    m_a: Tensor | None, m_b: Tensor | None, maps: ReprojectionMaps, *, preconditioned: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Carry the optimizer's averaged gradients through a reprojection: m_A ← b_mapᵀ m_A, m_B ← m_B a_mapᵀ.

    For the same x and δ the gradients at the new factors are ∇A' = (s·B'ᵀδ)xᵀ = b_mapᵀ ∇A and ∇B' = s·δ(A'x)ᵀ = ∇B
    a_mapᵀ; an average of gradients follows the same linear map. An average of preconditioned gradients moves like the
    factors themselves, m_A ← a_map m_A and m_B ← m_B b_map, because (Σ_g')⁻¹ b_mapᵀ ∇A = a_map Σ_g⁻¹ ∇A for
    b_map = a_map⁻¹.

    Source: beyond the paper.

    Args:
        m_a: First moment of A `[L, r, d_in]`; None for factors without one.
        m_b: First moment of B `[L, d_out, r]`; None for factors without one.
        maps: The reprojection.
        preconditioned: Whether the moments average preconditioned gradients instead of raw ones.

    Returns:
        The carried (m_A, m_B), each in its own dtype; None where None was given.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1, 1)
        >>> maps = ReprojectionMaps(a_map=2 * one, b_map=one / 2)
        >>> [m.item() for m in carry_first_moment(one, one, maps)]
        [0.5, 2.0]
        >>> [m.item() for m in carry_first_moment(one, one, maps, preconditioned=True)]
        [2.0, 0.5]
    """
    left, right = maps if preconditioned else gradient_maps(maps)
    return (
        None if m_a is None else (left @ m_a.to(left.dtype)).to(m_a.dtype),
        None if m_b is None else (m_b.to(right.dtype) @ right).to(m_b.dtype),
    )


@overload
def carry_second_moment(
    v_a: Tensor, v_b: Tensor, maps: ReprojectionMaps, *, preconditioned: bool = False
) -> tuple[Tensor, Tensor]: ...


@overload
def carry_second_moment(
    v_a: Tensor | None, v_b: Tensor | None, maps: ReprojectionMaps, *, preconditioned: bool = False
) -> tuple[Tensor | None, Tensor | None]: ...


def carry_second_moment(
    v_a: Tensor | None, v_b: Tensor | None, maps: ReprojectionMaps, *, preconditioned: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Carry Adam's averaged squared gradients through a reprojection, by the elementwise-squared maps of the first moment.

    An approximation: E[(Σ_j m_ij ∇_j)²] = Σ_j m_ij² E[∇_j²] + cross terms, and the cross terms E[∇_j ∇_l] are not
    known to an optimizer that keeps only the diagonal; they are taken as zero. Exact for permutations and rescalings
    of the coordinates.

    Source: beyond the paper.

    Args:
        v_a: Second moment of A `[L, r, d_in]`; None for factors without one.
        v_b: Second moment of B `[L, d_out, r]`; None for factors without one.
        maps: The reprojection.
        preconditioned: Whether the moments average preconditioned gradients instead of raw ones.

    Returns:
        The carried (v_A, v_B), nonnegative, each in its own dtype; None where None was given.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1, 1)
        >>> maps = ReprojectionMaps(a_map=2 * one, b_map=one / 2)
        >>> [v.item() for v in carry_second_moment(one, one, maps)]
        [0.25, 4.0]
    """
    squared = ReprojectionMaps(maps.a_map.square(), maps.b_map.square())
    return carry_first_moment(v_a, v_b, squared, preconditioned=preconditioned)
