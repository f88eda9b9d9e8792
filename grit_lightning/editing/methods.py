"""Ways to choose X of every layer by a strength μ, retention and its peers in closed form: all are I at μ = 0.

A method is a function of both statistics of the layers of one rank. To add one, write it and put it into `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from grit_lightning import functional as F
from grit_lightning.editing.adapter import Maps
from grit_lightning.editing.statistics import AdapterStatistics, GroupStatistics

Method = Callable[[GroupStatistics, GroupStatistics, float, float], Tensor]
"""`(of the task, of general text, μ, damping) → X [L, r, r]`"""


def two_fishers(task: GroupStatistics, general: GroupStatistics, mu: float, damping: float) -> Tensor:
    """Take away what costs general text more than it gives the task; see `functional.retention_map`."""
    return F.retention_map(task.a_cov, task.g_cov, general.a_cov, general.g_cov, mu, damping)


def scaling(task: GroupStatistics, general: GroupStatistics, mu: float, damping: float) -> Tensor:
    """Scale the whole adapter by α = 1 / (1 + μ): WiSE-FT (arXiv 2109.01903) between the backbone and the adapter."""
    return _identity(task.a_cov) / (1.0 + mu)


def activations_only(task: GroupStatistics, general: GroupStatistics, mu: float, damping: float) -> Tensor:
    """Use Σ_a alone, with the identity for Σ_g: RegMean (arXiv 2212.09849) of backbone and adapter."""
    one = _identity(task.a_cov)
    return F.retention_map(task.a_cov, one, general.a_cov, one, mu, damping)


def gradients_only(task: GroupStatistics, general: GroupStatistics, mu: float, damping: float) -> Tensor:
    """Use Σ_g alone, with the identity for Σ_a."""
    one = _identity(task.a_cov)
    return F.retention_map(one, task.g_cov, one, general.g_cov, mu, damping)


def diagonal(task: GroupStatistics, general: GroupStatistics, mu: float, damping: float) -> Tensor:
    """Use the diagonals of all four factors, in the coordinates that training left: Fisher merging (arXiv 2111.09832)."""
    factors = (task.a_cov, task.g_cov, general.a_cov, general.g_cov)
    a, g, b, h = (torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1)) for cov in factors)
    return F.retention_map(a, g, b, h, mu, damping)


def task_fisher_only(task: GroupStatistics, general: GroupStatistics, mu: float, damping: float) -> Tensor:
    """Take general text to hear all directions alike, at its mean loudness: an ablation."""
    return F.retention_map(task.a_cov, task.g_cov, _isotropic(general.a_cov), _isotropic(general.g_cov), mu, damping)


def general_fisher_only(task: GroupStatistics, general: GroupStatistics, mu: float, damping: float) -> Tensor:
    """Take the task to hear all directions alike, at its mean loudness: an ablation."""
    return F.retention_map(_isotropic(task.a_cov), _isotropic(task.g_cov), general.a_cov, general.g_cov, mu, damping)


def shuffled(task: GroupStatistics, general: GroupStatistics, mu: float, damping: float) -> Tensor:
    """Use retention's basis and factors 1 / (1 + μ d), but each at an entry drawn at random: an ablation."""
    basis = F.retention_basis(task.a_cov, task.g_cov, general.a_cov, general.g_cov, damping)
    generator = torch.Generator().manual_seed(0)
    layers, r, _ = basis.ratio.shape
    order = torch.stack([torch.randperm(r * r, generator=generator) for _ in range(layers)]).to(basis.ratio.device)
    ratio = basis.ratio.flatten(1).gather(1, order).view_as(basis.ratio)
    return basis._replace(ratio=ratio).map(mu).to(task.a_cov.dtype)


def gradient_step(task: GroupStatistics, general: GroupStatistics, mu: float, damping: float) -> Tensor:
    """Use the measured gradient of general text where retention takes the Fisher's word for it, G_p S_p.

    X minimises ½ tr((X−I)ᵀ G_t (X−I) S_t) + μ (⟨E[g aᵀ], X−I⟩ + ½ tr((X−I)ᵀ G_p (X−I) S_p)), both losses expanded at X = I.
    """
    basis = F.retention_basis(task.a_cov, task.g_cov, general.a_cov, general.g_cov, damping)
    pull = basis.g_basis.mT @ general.cross.double() @ basis.a_basis
    step = -mu * pull / (1.0 + mu * basis.ratio)
    return _identity(task.a_cov) + (basis.g_basis @ step @ basis.a_basis.mT).to(task.a_cov.dtype)


def balanced_cut(task: GroupStatistics, general: GroupStatistics, mu: float, damping: float) -> Tensor:
    """Keep the first r / (1 + μ) of the task's balanced directions, as a smaller adapter would."""
    r = task.a_cov.shape[-1]
    maps = F.balanced_maps(task.a_cov, task.g_cov, max(1, round(r / (1.0 + mu))))
    return maps.b_map @ maps.a_map


METHODS: Mapping[str, Method] = {
    "retention": two_fishers,
    "scaling": scaling,
    "activations_only": activations_only,
    "gradients_only": gradients_only,
    "diagonal": diagonal,
    "task_fisher_only": task_fisher_only,
    "general_fisher_only": general_fisher_only,
    "shuffled": shuffled,
    "gradient_step": gradient_step,
    "balanced_cut": balanced_cut,
}
"""By name; the first is ours."""


def maps_of(
    method: str, task: AdapterStatistics, general: AdapterStatistics, mu: float, damping: float
) -> dict[str, Tensor]:
    """Return X of every layer by name, from a method's name and a strength; nothing is edited at μ = 0."""
    if mu == 0:
        return {}
    maps: dict[str, Tensor] = {}
    for of_task, of_general in zip(task.groups, general.groups, strict=True):
        maps |= zip(of_task.names, METHODS[method](of_task, of_general, mu, damping), strict=True)
    return maps


def first_order(statistics: AdapterStatistics, maps: Maps) -> float:
    """Predict the loss's change under an edit to first order, nats per predicted token."""
    if not maps:
        return 0.0
    changes = [
        F.first_order_change(group.cross, torch.stack([maps[name] for name in group.names])).sum()
        for group in statistics.groups
    ]
    return float(torch.stack(changes).sum()) * statistics.per_predicted


def second_order(statistics: AdapterStatistics, maps: Maps, *, from_backbone: bool = False) -> float:
    """Predict the loss's change by the Fisher alone, nats per predicted token: from the adapter as it was, or the backbone."""
    total = torch.zeros((), dtype=torch.float64)
    for group in statistics.groups:
        one = _identity(group.a_cov)
        x = torch.stack([maps[name] for name in group.names]) if maps else one
        kept = one - x if from_backbone else x  # the output moves by (I − kept) a
        total += F.projection_cost(group.a_cov, group.g_cov, kept).double().sum().cpu()
    return float(total) * statistics.per_predicted


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


def _isotropic(cov: Tensor) -> Tensor:
    """Return the identity with the same trace."""
    return cov.diagonal(dim1=-2, dim2=-1).mean(dim=-1).view(-1, 1, 1) * _identity(cov)
