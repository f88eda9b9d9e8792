"""Reprojection: rotate (and cut) the rank space of an adapter along its covariances.

Notation: ΔW = s·B A with A `[r, d_in]`, B `[d_out, r]`; Σ_a = E[a aᵀ], Σ_g = E[g gᵀ] `[L, r, r]` with a = A x and
g = s·Bᵀδ; D_k = diag(1 for the first k coordinates, 0 after); U the eigenvectors of a factor, eigenvalues descending;
γ the blend. A reprojection is a pair of linear maps of the rank space, A ← a_map A and B ← B b_map, so that
ΔW → s·B M A with M = b_map a_map.

Each map is the paper's projection followed by the rotation into the kept eigenbasis. The rotation cancels in M, and
after it 'rank k' always means 'the first k coordinates'.

Predicted cost: the output changes by −s·B E a per token with E = I − M, the loss to second order by ½ E[(gᵀE a)²],
which under F ≈ Σ_g ⊗ Σ_a is ½ tr(Eᵀ Σ_g E Σ_a) = ½‖Σ_g^½ E Σ_a^½‖²_F.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from grit_lightning.functional._common import check_fraction, check_rank, check_square, working
from grit_lightning.functional.covariance import symmetrize


class ReprojectionMaps(NamedTuple):
    """The two linear maps of a reprojection: A ← a_map A, B ← B b_map."""

    a_map: Tensor
    """`[L, r, r]`, acts on A from the left."""
    b_map: Tensor
    """`[L, r, r]`, acts on B from the right."""


def eigenbasis(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of symmetric matrices, largest first.

    The sign of an eigenvector is arbitrary; here its largest entry is positive, so that the basis of a matrix that is
    already diagonal is the identity and a second reprojection has nothing to do.

    Source: paper § 'neural reprojection'; the sign rule is beyond the paper.

    Args:
        cov: Symmetric, finite, `[L, r, r]`.

    Returns:
        Eigenvalues clamped at zero, descending `[L, r]`, and eigenvectors as columns `[L, r, r]`.

    Raises:
        ValueError: `cov` is not a stack of square matrices.

    Example:
        >>> values, vectors = eigenbasis(torch.diag(torch.tensor([1.0, 3.0]))[None])
        >>> values[0], vectors[0]
        (tensor([3., 1.]), tensor([[0., 1.],
                [1., 0.]]))
    """
    check_square("cov", cov)
    values, vectors = _eigh(symmetrize(working(cov)))
    return values.flip(-1).clamp(min=0.0), _fix_signs(vectors.flip(-1))


def rank_mask(k: int | Tensor, r: int) -> Tensor:
    """Mark the first k of r coordinates.

    Source: paper § 'dynamic rank'.

    Args:
        k: Ranks, int64 `[L]` (or one int for a single layer).
        r: The adapter's rank.

    Returns:
        True for kept coordinates, bool `[L, r]`.

    Raises:
        ValueError: A rank lies outside [0, r].

    Example:
        >>> rank_mask(torch.tensor([1, 2]), 3)
        tensor([[ True, False, False],
                [ True,  True, False]])
    """
    check_rank("k", k, r)
    ranks = torch.as_tensor(k).reshape(-1, 1)
    return torch.arange(r, device=ranks.device) < ranks


def projector(vectors: Tensor, k: int | Tensor) -> Tensor:
    """Return the orthogonal projector on the first k columns: P = U D_k Uᵀ.

    Source: paper § 'neural reprojection'.

    Args:
        vectors: Orthonormal columns `[L, r, r]`.
        k: Ranks `[L]` or one int; or the coordinates to keep, bool `[L, r]`.

    Returns:
        Projectors `[L, r, r]`.

    Raises:
        ValueError: A rank lies outside [0, r].

    Example:
        >>> projector(torch.eye(2)[None], 1)[0]
        tensor([[1., 0.],
                [0., 0.]])
    """
    return (vectors * _kept(k, vectors).unsqueeze(-2)) @ vectors.mT


def one_sided_maps(
    a_cov: Tensor, k: int | Tensor, blend: float = 1.0, *, keep_dropped: bool = False
) -> ReprojectionMaps:
    """Project both factors on the top eigenvectors of Σ_a: the paper's one-sided reprojection.

    a_map = ((1−γ)I + γD_k) Uᵀ, b_map = U ((1−γ)I + γD_k), hence M = ((1−γ)I + γP_A)². With `keep_dropped` B takes A's
    share of the cut as well: a_map = Uᵀ and the same M, but the rows of A beyond k stay to be measured.

    Source: paper § 'neural reprojection' (Q-GRIT_uni).

    Args:
        a_cov: Σ_a `[L, r, r]`.
        k: Ranks `[L]` or one int; or the coordinates to keep, bool `[L, r]`.
        blend: γ in [0, 1]; 1 is a full projection.
        keep_dropped: Rotate A without cutting it, so that a dropped direction still gives B a gradient and can return.

    Returns:
        The maps.

    Raises:
        ValueError: A rank lies outside [0, r] or γ outside [0, 1].

    Example:
        >>> one_sided_maps(torch.diag(torch.tensor([1.0, 3.0]))[None], 1).a_map[0]
        tensor([[0., 1.],
                [0., 0.]])
    """
    _, u = eigenbasis(a_cov)
    d = _blended(k, u, blend)
    if keep_dropped:
        return ReprojectionMaps(u.mT, u * d.square().unsqueeze(-2))
    return ReprojectionMaps(d.unsqueeze(-1) * u.mT, u * d.unsqueeze(-2))


def two_sided_maps(
    a_cov: Tensor,
    g_cov: Tensor,
    k: int | Tensor,
    blend: float = 1.0,
    use_g: Tensor | None = None,
    *,
    keep_dropped: bool = False,
) -> ReprojectionMaps:
    """Project A on the top eigenvectors of Σ_a and B on those of Σ_g: the paper's two-sided reprojection.

    a_map = ((1−γ)I + γD_k) U_Aᵀ, b_map = ((1−γ)I + γP_G) U_A, hence M = ((1−γ)I + γP_G)((1−γ)I + γP_A). At γ = 1 the
    columns of B beyond k meet rows of A that are zero; they are zeroed too, so that the adapter has rank k.

    Source: paper § 'neural reprojection' (Q-GRIT).

    Args:
        a_cov: Σ_a `[L, r, r]`.
        g_cov: Σ_g `[L, r, r]`.
        k: Ranks `[L]` or one int; or the coordinates to keep, bool `[L, r]`.
        blend: γ in [0, 1]; 1 is a full projection.
        use_g: False where Σ_g has too few samples and P_A stands in for P_G, bool `[L]`; None trusts every layer.
        keep_dropped: As in `one_sided_maps`.

    Returns:
        The maps.

    Raises:
        ValueError: The shapes differ, a rank lies outside [0, r] or γ outside [0, 1].

    Example:
        >>> cov = torch.diag(torch.tensor([3.0, 1.0]))[None]
        >>> two_sided_maps(cov, cov, 1).b_map[0]
        tensor([[1., 0.],
                [0., 0.]])
    """
    _check_pair(a_cov, g_cov)
    one_sided = one_sided_maps(a_cov, k, blend, keep_dropped=keep_dropped)
    _, u_a = eigenbasis(a_cov)
    _, u_g = eigenbasis(g_cov)
    b_map = (1.0 - blend) * u_a + blend * (projector(u_g, k) @ u_a)
    if keep_dropped or blend == 1.0:
        b_map = b_map * _blended(k, b_map, blend).unsqueeze(-2)
    if use_g is not None:
        b_map = torch.where(use_g.reshape(-1, 1, 1), b_map, one_sided.b_map)
    return ReprojectionMaps(one_sided.a_map, b_map)


def projection_cost(a_cov: Tensor, g_cov: Tensor, m: Tensor) -> Tensor:
    """Predict the loss increase of ΔW = B A → B M A: ½ tr(Eᵀ Σ_g E Σ_a) with E = I − M.

    The output moves by −s·B E a, so with g = s·Bᵀδ the loss moves by −gᵀE a to first order. Its square averages to
    E[gᵀE a aᵀEᵀg] = tr(Eᵀ Σ_g E Σ_a) when g gᵀ and a aᵀ are uncorrelated (K-FAC), and ½ of that is the Fisher
    estimate of the second-order term; the mean first-order term vanishes at a stationary point and is left out.

    Source: beyond the paper.

    Args:
        a_cov: Σ_a `[L, r, r]`.
        g_cov: Σ_g `[L, r, r]`.
        m: The map of the rank space, `b_map @ a_map`, `[L, r, r]`.

    Returns:
        The cost in units of the loss, per token, `[L]`.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> projection_cost(torch.eye(2)[None], torch.eye(2)[None], torch.zeros(1, 2, 2))
        tensor([1.])
    """
    _check_pair(a_cov, g_cov)
    a_cov, g_cov, m = working(a_cov), working(g_cov), working(m)
    e = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device) - m
    return 0.5 * ((g_cov @ e) * (e @ a_cov)).sum(dim=(-2, -1))


def _fix_signs(vectors: Tensor) -> Tensor:
    """Flip columns so that the largest entry of each is positive."""
    largest = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def _kept(k: int | Tensor, like: Tensor) -> Tensor:
    """Return the coordinates to keep, bool `[L, r]`, from ranks or from such a mask, on the device of `like` `[L, …, r]`."""
    layers, r = like.shape[0], like.shape[-1]
    if isinstance(k, Tensor) and k.dtype == torch.bool:
        if k.shape != (layers, r):
            raise ValueError(f"k: expected a mask of kept coordinates {(layers, r)}, got {tuple(k.shape)}")
        return k.to(like.device)
    if isinstance(k, Tensor) and k.shape not in ((), (layers,)):
        raise ValueError(f"k: expected one rank per layer {(layers,)}, got {tuple(k.shape)}")
    return rank_mask(k, r).to(like.device).expand(layers, r)


def _blended(k: int | Tensor, like: Tensor, blend: float) -> Tensor:
    """Return the diagonal of (1−γ)I + γD_k, `[L, r]`."""
    check_fraction("blend", blend)
    return (1.0 - blend) + blend * _kept(k, like).to(like.dtype)


def _check_pair(a_cov: Tensor, g_cov: Tensor) -> None:
    """Raise ValueError unless both factors are square stacks of one shape."""
    check_square("a_cov", a_cov)
    if g_cov.shape != a_cov.shape:
        raise ValueError(f"g_cov: expected the shape of a_cov {tuple(a_cov.shape)}, got {tuple(g_cov.shape)}")


def _eigh(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose symmetric matrices, ascending; entries that are nothing beside the largest one may stop the solver.

    LAPACK fails to converge on blocks of subnormal numbers, which is what a moving average leaves of a direction that
    has been dropped. Where that happens the matrices are scaled by a power of two, which is exact, and entries below the
    rounding of the largest one's square are set to zero.
    """
    try:
        values, vectors = torch.linalg.eigh(cov)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not in torch's __all__
        peak = cov.abs().amax(dim=(-2, -1), keepdim=True)
        unit = torch.where(peak > 0, torch.exp2(torch.log2(peak).floor()), 1.0)
        scaled = cov / unit
        negligible = scaled.abs() < torch.finfo(cov.dtype).eps ** 2
        values, vectors = torch.linalg.eigh(scaled.masked_fill(negligible, 0.0))
        values = values * unit.squeeze(-1)
    return values, vectors
