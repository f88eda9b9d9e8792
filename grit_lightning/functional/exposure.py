r"""What an adapter costs general text, as a penalty with an exact gradient for both of its factors.

Notation: x the layer's input, δ the gradient of the sum of token losses at its output, both on general text; a = A x `[.., r]`,
g = s·Bᵀδ `[.., r]`; Σ_x = E[x xᵀ], Σ_δ = E[δ δᵀ]. The second term of `retention` at X = I is

    J = ½ tr(G_p S_p),        G_p = E[g gᵀ] = s² BᵀΣ_δB,   S_p = E[a aᵀ] = A Σ_x Aᵀ
      = ½ tr(Σ_δ ΔW Σ_x ΔWᵀ),                                ΔW = s·B A:

the Kronecker-factored Laplace penalty that pulls ΔW to the backbone's 0. Σ_x and Σ_δ belong to the backbone and are held
constant, although both depend a little on the adapter; A and B are not. Without ever forming them,

    ∇_A J = s² BᵀΣ_δB A Σ_x = G_p E[a xᵀ],        ∇_B J = s² Σ_δ B A Σ_x Aᵀ = E[s·δ gᵀ] S_p,

and Bᵀ∇_B J = G_p S_p is the gradient at X = I of the cost of B ← B X. (A, B) → (T A, B T⁻¹) leaves J as it is.

Source: beyond the paper. It is the penalty of Laplace LoRA methods (LaLoRA, arXiv 2512.17720, K-FAC), with its factors kept in
rank space and measured again as the adapter moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grit_lightning.functional._common import check_not_negative, check_square, working


def exposure_gradients(
    a_cov: Tensor, g_cov: Tensor, input_cross: Tensor, output_cross: Tensor, mu: float
) -> tuple[Tensor, Tensor]:
    """Return μ ∇_A J and μ ∇_B J; the module says of what.

    Source: beyond the paper.

    Args:
        a_cov: S_p `[L, r, r]`.
        g_cov: G_p `[L, r, r]`, of gradients of the sum of token losses.
        input_cross: E[a xᵀ] `[L, r, d_in]`.
        output_cross: E[s·δ gᵀ] `[L, d_out, r]`.
        mu: μ ≥ 0.

    Returns:
        Gradients of A `[L, r, d_in]` and B `[L, d_out, r]`, of nats per token.

    Raises:
        ValueError: μ is negative or not finite, or a covariance is not square.

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> [gradient.item() for gradient in exposure_gradients(2 * one, 3 * one, 5 * one, 7 * one, mu=2.0)]
        [30.0, 28.0]
    """
    check_not_negative("mu", mu)
    check_square("a_cov", a_cov)
    check_square("g_cov", g_cov)
    dtype = torch.promote_types(working(a_cov).dtype, working(input_cross).dtype)
    return mu * g_cov.to(dtype) @ input_cross.to(dtype), mu * output_cross.to(dtype) @ a_cov.to(dtype)
