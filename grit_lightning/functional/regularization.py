"""Optional regularisers of the adapter, as quadratic forms of the rank-space activation.

Notation: a = A x `[.., r]`; Σ_a, Σ_g `[L, r, r]`; P the projector on the top-k eigenvectors of Σ_a; ΔW = s·B A. Both are
½ E[aᵀ Q a] with a layer's own Q `[r, r]`, so that their gradient at a is Q a and nothing but rank-space quantities is needed:

    curvature      Q = λ_K Σ_g                        ½ λ_K tr(Σ_g Σ_a) = ½ λ_K ‖Σ_g^½ Σ_a^½‖²_F
    reprojection   Q = λ_R s² (I−P) BᵀB (I−P)         ½ λ_R E‖(ΔW − ΔW_P) x‖², ΔW_P = s·B P A

The first is the predicted loss of switching the adapter off (its curvature exposure), the second what the next reprojection
would take from the adapter's output. Source: paper, objective view (figure 2); the forms in a are ours.
"""

import torch
from torch import Tensor

from grit_lightning.functional._common import check_not_negative, check_square, working


def curvature_form(g_cov: Tensor, weight: float) -> Tensor:
    """Q of the curvature regulariser: λ_K Σ_g.

    Args:
        g_cov: Σ_g `[L, r, r]`.
        weight: λ_K ≥ 0.

    Returns:
        Q `[L, r, r]`.

    Raises:
        ValueError: Negative weight or wrong shape.

    Example:
        >>> curvature_form(torch.eye(1)[None], 0.5)
        tensor([[[0.5000]]])
    """
    check_square("g_cov", g_cov)
    check_not_negative("curvature_penalty", weight)
    return weight * working(g_cov)


def reprojection_form(projector: Tensor, b_gram: Tensor, weight: float) -> Tensor:
    """Q of the reprojection-consistency regulariser: λ_R (I−P) s²BᵀB (I−P).

    Args:
        projector: P `[L, r, r]`.
        b_gram: s²·BᵀB `[L, r, r]`.
        weight: λ_R ≥ 0.

    Returns:
        Q `[L, r, r]`.

    Raises:
        ValueError: Negative weight or wrong shape.

    Example:
        >>> reprojection_form(torch.diag(torch.tensor([1.0, 0.0]))[None], torch.ones(1, 2, 2), 2.0)[0]
        tensor([[0., 0.],
                [0., 2.]])
    """
    check_square("projector", projector)
    check_square("b_gram", b_gram)
    check_not_negative("reprojection_penalty", weight)
    rest = torch.eye(projector.shape[-1], dtype=projector.dtype, device=projector.device) - projector
    return weight * (rest @ working(b_gram) @ rest)


def quadratic_penalty(form: Tensor, a_cov: Tensor) -> Tensor:
    """Value of a regulariser: ½ tr(Q Σ_a) = ½ E[aᵀ Q a].

    Args:
        form: Q `[L, r, r]`.
        a_cov: Σ_a `[L, r, r]`.

    Returns:
        `[L]`, nats per token for the curvature regulariser at λ_K = 1.

    Example:
        >>> quadratic_penalty(2.0 * torch.eye(2)[None], torch.eye(2)[None])
        tensor([2.])
    """
    return 0.5 * (working(form) * working(a_cov)).sum(dim=(-2, -1))
