"""Lets the effective rank of every layer follow its spectrum."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
from torch import Tensor

from grit_lightning import functional as F
from grit_lightning.callbacks.base import GeometryCallback
from grit_lightning.geometry import RankSpaceGeometry
from grit_lightning.rank_group import RankGroup

Rule = Literal["energy"]


class RankAdaptation(GeometryCallback):
    """Sets each layer's effective rank k to the smallest that keeps the fraction τ of its spectral energy (paper §2.4).

    A reduction takes effect at once: B loses its columns beyond k, so that the adapter's function is the one a compacted
    adapter of rank k computes, while the rows of A stay and go on being measured. If the spectrum widens again, k rises and
    the columns grow back from zero.

    Args:
        rule: `energy`: k = min{m : Σ_{i≤m} λ_i / Σ λ_i ≥ τ} over the eigenvalues of Σ_a.
        threshold: τ in (0, 1].
        min_rank: Smallest effective rank (paper: min_lora_rank); layers whose r is smaller keep their r.
        start_step: First optimizer step at which ranks may change (paper: rank_adaptation_start_step).
        every_n_steps: Optimizer steps between decisions.
        hysteresis: ε ≥ 0: k falls only if τ + ε of the energy is kept, and rises only if less than τ − ε is.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        rule: Rule = "energy",
        threshold: float = 0.99,
        min_rank: int = 4,
        start_step: int = 0,
        every_n_steps: int = 50,
        hysteresis: float = 0.0,
    ) -> None:
        """Check and remember the settings."""
        super().__init__(every_n_steps, start_step)
        if rule != "energy":
            raise ValueError(f"RankAdaptation.rule must be energy, got {rule!r}.")
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"RankAdaptation.threshold (τ) must lie in (0, 1], got {threshold}.")
        if min_rank < 1:
            raise ValueError(f"RankAdaptation.min_rank must be an integer ≥ 1, got {min_rank}.")
        if not 0.0 <= hysteresis < 1.0:
            raise ValueError(f"RankAdaptation.hysteresis (ε) must lie in [0, 1), got {hysteresis}.")
        self.rule: Rule = rule
        self.threshold = threshold
        self.min_rank = min_rank
        self.hysteresis = hysteresis

    def validate(self, geometry: RankSpaceGeometry) -> None:
        """Refuse a minimum that no layer can have.

        Raises:
            ValueError: If min_rank exceeds the largest LoRA rank.
        """
        largest = max(group.r for group in geometry.groups)
        if self.min_rank > largest:
            raise ValueError(
                f"RankAdaptation.min_rank is {self.min_rank}, but the adapter's rank is {largest}: "
                f"set min_rank to at most {largest}."
            )

    def decide(self, group: RankGroup) -> Tensor:
        """Return the effective rank `[L]` int64 each layer of `group` should have."""
        values, _ = F.eigenbasis(group.a_cov.cpu())
        energy = F.cumulative_energy(values)
        return F.energy_rank_with_hysteresis(
            energy, group.ranks, self.threshold, self.hysteresis, min_rank=min(self.min_rank, group.r)
        )

    def act(self, trainer: pl.Trainer, geometry: RankSpaceGeometry) -> None:
        """Decide, and truncate or widen the layers whose rank changes."""
        geometry.reduce()
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        ranks = {
            site.name: int(rank)
            for group in geometry.groups
            for site, rank, enough in zip(group.sites, self.decide(group), geometry.enough(group), strict=True)
            if enough
        }
        geometry.set_ranks(_rotate_and_truncate, ranks, optimizer=optimizer)


def _rotate_and_truncate(a_cov: Tensor, g_cov: Tensor, k: Tensor, enough_g: Tensor) -> F.ReprojectionMaps:
    return F.one_sided_maps(a_cov, k, 1.0, keep_dropped=True)
