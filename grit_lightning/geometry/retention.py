"""The map that keeps what the backbone knew, for all layers of a model: as an edit, and as an order of directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from grit_lightning import functional as F
from grit_lightning.geometry.rank_group import RankGroup
from grit_lightning.geometry.rank_space import RankSpaceGeometry

TOKENS_PER_RANK = 10
"""Tokens of general text for each unit of rank: fewer leave most of a covariance to chance."""


class RetentionEdit(NamedTuple):
    """What an edit would do, and what it is predicted to cost; nats per token of each kind of text, summed over layers."""

    mu: float
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
        enough, basis = task.has_enough_samples(mine) & _heard(other), _basis(mine, other, damping)
        maps.append(_map(basis, enough, mu))
        predicted = torch.stack([basis.task_cost(mu), basis.general_cost(0.0), basis.general_cost(mu)])
        costs += (predicted * enough).sum(-1).cpu()
        layers += int(enough.sum())
    return RetentionEdit(mu, maps, layers, *costs.tolist())


@contextmanager
@torch.no_grad()
def tried(task: RankSpaceGeometry, maps: Sequence[Tensor]) -> Iterator[None]:
    """Have B X in place of B for a while, X `[L, r, r]` for each group; statistics and moments stay as they are."""
    factors = [factor for group in task.groups for factor in group.factors("b")]
    found = [factor.detach().clone() for factor in factors]
    try:
        for factor, x in zip(factors, (x for of_group in maps for x in of_group), strict=True):
            factor.copy_(factor.to(torch.promote_types(factor.dtype, x.dtype)) @ x.to(factor.device))
        yield
    finally:
        for factor, before in zip(factors, found, strict=True):
            factor.copy_(before)


def judge_by_retention(task: RankSpaceGeometry, general: RankSpaceGeometry, mu: float, damping: float) -> None:
    """Have reprojection and ranks put directions in order by what the edit at μ would leave of them, from now on.

    Instead of Σ_g they see XᵀΣ_gX, the task's curvature behind B ← B X, so that σ are the singular values of Σ_g^½ X Σ_a^½: a
    direction counts as much as an edit would leave of it. Where general text pays d times what the task does for a direction of
    both, that is σ / (1 + μ d). ΔW itself is cut, not edited.

    Args:
        task: The geometry of the training.
        general: The estimate `beside` it; it has to be reduced before every decision.
        mu: As in `retention_edit`.
        damping: As in `retention_edit`.
    """

    def judged(mine: RankGroup, other: RankGroup) -> Tensor:
        x = _map(_basis(mine, other, damping), task.has_enough_samples(mine) & _heard(other), mu)
        return F.symmetrize(x.mT @ mine.g_cov @ x)

    for mine, other in zip(task.groups, general.groups, strict=True):
        mine.judged_by = partial(judged, mine, other)


def judge_by_task(task: RankSpaceGeometry) -> None:
    """Have reprojection and ranks put directions in order by the task's curvature alone, from now on."""
    for group in task.groups:
        group.judged_by = None


def _heard(general: RankGroup) -> Tensor:
    """Layers `[L]` bool that enough tokens of general text have gone through."""
    return general.counts.tokens >= TOKENS_PER_RANK * general.r


def _basis(task: RankGroup, general: RankGroup, damping: float) -> F.RetentionBasis:
    kept = task.kept
    return F.retention_basis(
        _inside(task.a_cov, kept, fill=True),
        _inside(task.g_cov, kept, fill=True),
        _inside(general.a_cov, kept),
        _inside(general.g_cov, kept),
        damping,
    )


def _map(basis: F.RetentionBasis, enough: Tensor, mu: float) -> Tensor:
    """Return X `[L, r, r]`, the identity for layers without enough samples."""
    x = basis.map(mu)
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.where(enough.view(-1, 1, 1), x, identity).float()


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
