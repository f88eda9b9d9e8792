"""The map that keeps what the backbone knew, for all layers of a model, from a task's and a general estimate of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grit_lightning import functional as F
from grit_lightning.geometry.rank_space import RankSpaceGeometry


class RetentionEdit(NamedTuple):
    """What an edit would do, and what it is predicted to cost; nats per token of each kind of text, summed over layers."""

    maps: list[Tensor]
    """X `[L, r, r]` for each group of the geometry; the identity where a layer has too few samples of either."""
    layers: int
    """Layers with enough samples."""
    task_cost: float
    """What the task loses."""
    general_cost_before: float
    """What the adapter costs general text as it is."""
    general_cost_after: float
    """What it costs general text after the edit."""


@torch.no_grad()
def retention_edit(task: RankSpaceGeometry, general: RankSpaceGeometry, mu: float, damping: float) -> RetentionEdit:
    """Work out the edit at μ; nothing is changed, but statistics of all processes are summed: a collective.

    Args:
        task: The geometry of the training.
        general: The estimate `beside` it.
        mu: μ ≥ 0, what a nat of general text is worth in nats of the task.
        damping: As in `functional.retention_map`.

    Raises:
        ValueError: If μ or the damping is negative.
    """
    task.reduce()
    general.reduce()
    maps, layers, costs = [], 0, torch.zeros(3, dtype=torch.float64)
    for mine, other in zip(task.groups, general.groups, strict=True):
        enough = task.has_enough_samples(mine) & (other.counts.tokens >= mine.r)
        basis = F.retention_basis(
            _inside(mine.a_cov, mine.kept, fill=True),
            _inside(mine.g_cov, mine.kept, fill=True),
            _inside(other.a_cov, mine.kept),
            _inside(other.g_cov, mine.kept),
            damping,
        )
        identity = torch.eye(mine.r, dtype=torch.float64, device=mine.device)
        maps.append(torch.where(enough.view(-1, 1, 1), basis.map(mu), identity).float())
        predicted = torch.stack([basis.task_cost(mu), basis.general_cost(0.0), basis.general_cost(mu)])
        costs += (predicted * enough).sum(-1).cpu()
        layers += int(enough.sum())
    return RetentionEdit(maps, layers, *costs.tolist())


def _inside(cov: Tensor, kept: Tensor, *, fill: bool = False) -> Tensor:
    """Set a covariance to zero beyond the rank, where B has no columns to change; float64 `[L, r, r]`.

    With `fill`, the diagonal there is the mean of that inside: the two parts stay apart, and the damping, which is relative to
    the mean eigenvalue, is that of the part inside.
    """
    inside = cov.double() * (kept.unsqueeze(-1) & kept.unsqueeze(-2))
    if not fill:
        return inside
    mean = inside.diagonal(dim1=-2, dim2=-1).sum(-1) / kept.sum(-1).clamp(min=1)
    return inside + torch.diag_embed(mean.unsqueeze(-1) * ~kept)
