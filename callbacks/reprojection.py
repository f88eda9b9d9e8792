"""Periodic reprojection of the adapter onto its dominant curvature directions."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from grit_lightning import functional as F
from grit_lightning.callbacks.base import GeometryCallback
from grit_lightning.geometry import MapsRule, RankSpaceGeometry

Mode = Literal["one_sided", "two_sided", "balanced"]


class Reprojection(GeometryCallback):
    """Reprojects every layer onto k curvature directions, after the optimizer step (paper §2.3).

    Args:
        mode: `one_sided` projects A and B with the eigenvectors of Σ_a (paper), `two_sided` B with those of Σ_g (paper's
            Q-GRIT), `balanced` drops the directions that cost the least predicted loss (beyond the paper).
        every_n_steps: Optimizer steps between reprojections (paper: reprojection_freq).
        start_step: First optimizer step at which one may happen (paper: reprojection_warmup_steps).
        k: Directions to keep (paper: reprojection_k), a cap on every layer's effective rank; None keeps as many as the
            effective rank says, which `RankAdaptation` sets.
        blend: γ in (0, 1]; 1 projects fully. A smaller γ damps the other directions by 1 − γ and keeps the rank.
        keep_dropped: Keep the rows of A beyond k, which the zeroed columns of B make inert: ΔW is the same, but dropped
            directions stay measured, so that ranks can rise again and the energy of the next decision is that of the whole
            spectrum. False zeroes them, as the paper's A ← P_A A does to the letter. `balanced` always keeps them.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        mode: Mode = "one_sided",
        every_n_steps: int = 50,
        start_step: int = 0,
        k: int | None = None,
        blend: float = 1.0,
        keep_dropped: bool = True,
    ) -> None:
        """Check and remember the settings."""
        super().__init__(every_n_steps, start_step)
        if mode not in ("one_sided", "two_sided", "balanced"):
            raise ValueError(f"Reprojection.mode must be one_sided, two_sided or balanced, got {mode!r}.")
        if k is not None and k < 1:
            raise ValueError(f"Reprojection.k must be an integer ≥ 1 or null, got {k}.")
        if not 0.0 < blend <= 1.0:
            raise ValueError(f"Reprojection.blend must lie in (0, 1], got {blend}.")
        self.mode: Mode = mode
        self.k = k
        self.blend = blend
        self.keep_dropped = keep_dropped

    def validate(self, geometry: RankSpaceGeometry) -> None:
        """Refuse a k that no layer can have.

        Raises:
            ValueError: If k exceeds the largest LoRA rank.
        """
        largest = max(group.r for group in geometry.groups)
        if self.k is not None and self.k > largest:
            raise ValueError(
                f"Reprojection.k (reprojection_k) is {self.k}, but the adapter's rank is {largest}: "
                f"set k to at most {largest}, or raise adapter.r."
            )

    def act(self, trainer: pl.Trainer, geometry: RankSpaceGeometry) -> None:
        """Reproject every layer that has enough samples."""
        ranks = {name: rank if self.k is None else min(rank, self.k) for name, rank in geometry.ranks.items()}
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        rule = maps_rule(self.mode, self.blend, self.keep_dropped)
        geometry.reproject(rule, ranks, blend=self.blend, optimizer=optimizer)


def maps_rule(mode: Mode, blend: float = 1.0, keep_dropped: bool = True) -> MapsRule:
    """Return the rule `(Σ_a, Σ_g, k, enough_g) → maps` of a mode, stacked over layers."""

    def rule(a_cov: Tensor, g_cov: Tensor, k: Tensor, enough_g: Tensor) -> F.ReprojectionMaps:
        if mode == "one_sided":
            return F.one_sided_maps(a_cov, k, blend, keep_dropped=keep_dropped)
        if mode == "two_sided":
            return F.two_sided_maps(a_cov, g_cov, k, blend, enough_g, keep_dropped=keep_dropped)
        # Without any gradient seen there is nothing to balance against: Σ_a alone decides.
        balanced = F.balanced_maps(a_cov, g_cov, k, blend)
        fallback = F.one_sided_maps(a_cov, k, blend, keep_dropped=True)
        where = enough_g.view(-1, 1, 1)
        return F.ReprojectionMaps(*(torch.where(where, new, old) for new, old in zip(balanced, fallback, strict=True)))

    return rule
