r"""Retention: change a trained adapter so that it keeps what the backbone knew, by two Fishers in rank space.

Notation per layer: ΔW = s·B A → s·B X A with X `[r, r]`; (S_t, G_t) = (Σ_a, Σ_g) on the task, (S_p, G_p) on general text.
Under F ≈ G ⊗ S the output's change s·B (X − I) a costs the task ½ tr((I−X)ᵀ G_t (I−X) S_t), and the adapter as it is left
costs the backbone's own knowledge ½ tr(Xᵀ G_p X S_p), as X = 0 is the backbone. So X minimises

    ½ tr((I−X)ᵀ G_t (I−X) S_t) + μ · ½ tr(Xᵀ G_p X S_p)        ⇔        G_t (X − I) S_t + μ G_p X S_p = 0.

Each pair diagonalises together: W_gᵀ G_t W_g = I and W_gᵀ G_p W_g = diag(d_g), W_aᵀ S_t W_a = I and W_aᵀ S_p W_a = diag(d_a).
With X = W_g Y W_aᵀ, multiplied by W_gᵀ from the left and by W_a from the right,

    Y_ij (1 + μ d_g,i d_a,j) = C_ij,        C = W_g⁻¹ W_a⁻ᵀ:

a Wiener filter, 1 / (1 + μ d_g d_a). μ → 0 gives I, μ → ∞ gives 0 wherever general text can tell. (A, B) → (T A, B T⁻¹) turns
X into T X T⁻¹, so ΔW changes alike in every gauge. What is kept of general text is 2 r² numbers a layer.

Source: beyond the paper. It is the merge of backbone and adapter that Fisher merging (Matena and Raffel, arXiv 2111.09832) does
with diagonal Fishers and RegMean (arXiv 2212.09849) with activations alone, with Kronecker factors and in closed form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grit_lightning.functional._common import check_not_negative, check_square, working

_NEGLIGIBLE = 1e-12
"""What a direction counts at least that the task has said nothing in, as part of its factor's mean eigenvalue, or of general
text's where all of the factor is zero: so that there is one minimum, and float64 finds it."""


class RetentionBasis(NamedTuple):
    """The two pairs of factors, diagonalised together; float64. A map for any μ is then two products."""

    g_basis: Tensor
    """W_g `[L, r, r]`: W_gᵀ G_t W_g = I."""
    a_basis: Tensor
    """W_a `[L, r, r]`: W_aᵀ S_t W_a = I."""
    ratio: Tensor
    """d_g,i · d_a,j `[L, r, r]` ≥ 0: what general text pays for an entry of Y, in units of what the task pays."""
    identity: Tensor
    """C = W_g⁻¹ W_a⁻ᵀ `[L, r, r]`: X = I in these coordinates."""

    def map(self, mu: float | Tensor) -> Tensor:
        """Return X `[L, r, r]` at μ, a number or one for each layer `[L]`."""
        return self.g_basis @ (self.identity * self._filter(mu)) @ self.a_basis.mT

    def task_cost(self, mu: float | Tensor) -> Tensor:
        """Predict what the task loses at μ: ½ Σ (C − Y)² `[L]`, nats per token; rises with μ."""
        return 0.5 * (self.identity * (1.0 - self._filter(mu))).square().sum(dim=(-2, -1))

    def general_cost(self, mu: float | Tensor) -> Tensor:
        """Predict what the adapter costs general text at μ: ½ Σ d_g d_a Y² `[L]`, nats per token; falls with μ."""
        return 0.5 * (self.ratio * (self.identity * self._filter(mu)).square()).sum(dim=(-2, -1))

    def _filter(self, mu: float | Tensor) -> Tensor:
        if not isinstance(mu, Tensor):
            check_not_negative("mu", mu)
        elif mu.shape not in ((), self.ratio.shape[:1]):
            raise ValueError(f"mu: expected one number per layer {tuple(self.ratio.shape[:1])}, got {tuple(mu.shape)}")
        elif mu.device.type == "cpu" and not bool(((mu >= 0.0) & mu.isfinite()).all()):  # elsewhere the host would wait
            raise ValueError(
                f"mu: expected finite numbers ≥ 0, got some between {float(mu.min())} and {float(mu.max())}"
            )
        strength = torch.as_tensor(mu, dtype=self.ratio.dtype, device=self.ratio.device).reshape(-1, 1, 1)
        return 1.0 / (1.0 + strength * self.ratio)


def retention_basis(
    task_a: Tensor, task_g: Tensor, general_a: Tensor, general_g: Tensor, damping: float = 1e-4
) -> RetentionBasis:
    """Diagonalise the task's and general text's factors together; see `retention_map` for the arguments."""
    for name, cov in (("task_a", task_a), ("task_g", task_g), ("general_a", general_a), ("general_g", general_g)):
        check_square(name, cov)
        if cov.shape != task_a.shape:
            raise ValueError(f"{name}: expected the shape of task_a {tuple(task_a.shape)}, got {tuple(cov.shape)}")
    check_not_negative("damping", damping)
    a_basis, a_inverse, a_ratio = _simultaneous(task_a.double(), general_a.double(), damping)
    g_basis, g_inverse, g_ratio = _simultaneous(task_g.double(), general_g.double(), damping)
    return RetentionBasis(g_basis, a_basis, g_ratio.unsqueeze(-1) * a_ratio.unsqueeze(-2), g_inverse @ a_inverse.mT)


def retention_map(
    task_a: Tensor,
    task_g: Tensor,
    general_a: Tensor,
    general_g: Tensor,
    mu: float | Tensor,
    damping: float = 1e-4,
) -> Tensor:
    """Find X for B ← B X: what the task needs stays, what only general text hears goes.

    Source: beyond the paper; the module says how it follows.

    Args:
        task_a: S_t = Σ_a on task rows `[L, r, r]`.
        task_g: G_t = Σ_g on task rows `[L, r, r]`, of gradients of the sum of token losses.
        general_a: S_p = Σ_a on general text, through the same adapter `[L, r, r]`.
        general_g: G_p = Σ_g on general text `[L, r, r]`.
        mu: μ ≥ 0, what a nat of general text is worth in nats of the task, per token of each; one for all layers, or `[L]`.
        damping: Part of its mean eigenvalue that is added to each task factor, so that directions in which the task has said
            nothing are not noise divided by noise. At 0 the map of factors of full rank is exactly gauge covariant.

    Returns:
        X `[L, r, r]`, in the dtype of the factors (float32 or better); computed in float64.

    Raises:
        ValueError: The shapes differ, or μ or the damping is negative or not finite.

    Example:
        >>> one = torch.eye(2)[None]
        >>> retention_map(one, one, one, torch.diag(torch.tensor([0.0, 9.0]))[None], mu=1.0, damping=0.0)[0]
        tensor([[1.0000, 0.0000],
                [0.0000, 0.1000]])
    """
    return retention_basis(task_a, task_g, general_a, general_g, damping).map(mu).to(working(task_a).dtype)


def first_order_change(cross: Tensor, x: Tensor) -> Tensor:
    """Predict the loss's change under B ← B X to first order, all layers' effects added: tr((X − I) E[a gᵀ]).

    Layers and positions push the loss together, which the Fisher terms, that take them for independent, do not see; and an
    adapter is seldom at a minimum of either loss. E[g aᵀ] is free: it is Bᵀ∇B of the loss.

    Source: beyond the paper.

    Args:
        cross: E[g aᵀ] = Bᵀ∇B `[L, r, r]`, of the mean loss.
        x: X `[L, r, r]`.

    Returns:
        `[L]`, in the units of the loss whose gradient it was.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> first_order_change(torch.tensor([[[-0.5]]]), torch.tensor([[[0.0]]]))
        tensor([0.5000])
    """
    check_square("cross", cross)
    if x.shape != cross.shape:
        raise ValueError(f"x: expected the shape of cross {tuple(cross.shape)}, got {tuple(x.shape)}")
    dtype = torch.promote_types(working(x).dtype, working(cross).dtype)
    change = x.to(dtype) - torch.eye(x.shape[-1], dtype=dtype, device=x.device)
    return (change * cross.to(dtype)).sum(dim=(-2, -1))


def _simultaneous(task: Tensor, general: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonalise both: Wᵀ (task, damped) W = I, Wᵀ general W = diag(d). Returns W, W⁻¹ `[L, r, r]` and d `[L, r]`."""
    task, general = 0.5 * (task + task.mT), 0.5 * (general + general.mT)
    scale, others = _mean_eigenvalue(task), _mean_eigenvalue(general)
    ridge = torch.where(scale > 0, damping * scale, torch.where(others > 0, _NEGLIGIBLE * others, 1.0))
    values, vectors = torch.linalg.eigh(task)
    root = (torch.maximum(values, _NEGLIGIBLE * scale.squeeze(-1)) + ridge.squeeze(-1)).sqrt()
    whitener = vectors / root.unsqueeze(-2)
    ratio, rotation = torch.linalg.eigh(whitener.mT @ general @ whitener)
    return whitener @ rotation, rotation.mT @ (vectors * root.unsqueeze(-2)).mT, ratio.clamp(min=0.0)


def _mean_eigenvalue(cov: Tensor) -> Tensor:
    """Mean eigenvalue `[L, 1, 1]`."""
    return cov.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp(min=0.0).reshape(-1, 1, 1)
