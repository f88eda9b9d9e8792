"""The ranks of all layers at one decision, and what has to be remembered from one decision to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from grit_lightning import functional as F
from grit_lightning.geometry.rank_proposal import RankGuards, RankProposal
from grit_lightning.geometry.rank_rules import LayerSpectra, RankRule
from grit_lightning.geometry.rank_space import RankSpaceGeometry


class RankChoice(NamedTuple):
    """One decision; lists are in the order of `geometry.layers`."""

    current: list[int]
    """Ranks in force."""
    ranks: list[int]
    """Ranks to set."""
    reasons: list[str]
    masked_coordinates: dict[str, int]
    """By layer name, the kept coordinate to zero this once."""


class RankSelector:
    """Chooses ranks by a rule, and remembers the average, the spectra of dropped directions and the draws of the mixing.

    Args:
        rule: Which ranks are wanted.
        guards: How far they may move.
        energy_ema: β in [0, 1): decay per decision of the average that stands in for the spectrum; 0 takes it as it is.
        return_ratio: Gain at which a dropped direction returns that the rule does not measure; None never returns one.
        mixing_probability: Chance, per layer and decision, that one kept direction is zeroed once.
        seed: Of the mixing, the same on all processes.
    """

    def __init__(
        self,
        rule: RankRule,
        guards: RankGuards,
        *,
        energy_ema: float = 0.0,
        return_ratio: float | None = 2.0,
        mixing_probability: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Start without any memory."""
        self.rule = rule
        self.guards = guards
        self.energy_ema = energy_ema
        self.return_ratio = None if rule.measures_dropped else return_ratio
        self.mixing_probability = mixing_probability
        self._average: Tensor | None = None
        self._dropped_spectrum: Tensor | None = None
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def choose(self, geometry: RankSpaceGeometry, min_samples: int) -> RankChoice:
        """Choose the rank of every layer.

        Args:
            geometry: Whose ranks; its statistics must have been reduced.
            min_samples: Tokens that a layer must have contributed; others keep their rank.

        Returns:
            The ranks, the reasons, and what mixing zeroes.
        """
        enough = torch.cat([group.counts.tokens.cpu() >= min_samples for group in geometry.groups])
        layers = self._layer_spectra(geometry, enough)
        proposal = self.guards.propose(self.rule, layers._replace(values=self._averaged(layers.values)))
        proposal = self._raise_regrown_ranks(geometry, layers, proposal)
        ranks = torch.where(enough, torch.tensor(proposal.ranks), layers.current)
        reasons = [
            reason if ready else "too few samples"
            for reason, ready in zip(proposal.reasons, enough.tolist(), strict=True)
        ]
        masked = self._mix(list(geometry.layers), ranks, enough & (ranks <= layers.current), layers.values.shape[-1])
        if self._dropped_spectrum is not None:  # directions that returned are judged by what they become
            self._dropped_spectrum = self._dropped_spectrum * ~F.rank_mask(ranks, layers.values.shape[-1])
        return RankChoice(layers.current.tolist(), ranks.tolist(), reasons, masked)

    def _layer_spectra(self, geometry: RankSpaceGeometry, enough: Tensor) -> LayerSpectra:
        """Gather spectra and bounds; what the rule does not measure of dropped directions is as it was at the drop."""
        groups, widest = geometry.groups, max(group.r for group in geometry.groups)
        spectra = [self.rule.spectrum(group.a_cov.cpu(), group.judged_g_cov.cpu()) for group in groups]
        values = torch.cat([pad(spectrum, (0, widest - spectrum.shape[-1])) for spectrum in spectra])
        current = torch.cat([group.ranks for group in groups])
        if not self.rule.measures_dropped:
            before = torch.zeros_like(values) if self._dropped_spectrum is None else self._dropped_spectrum
            self._dropped_spectrum = torch.where(F.rank_mask(current, widest), values, before)
            values = self._dropped_spectrum.sort(dim=-1, descending=True).values
        return LayerSpectra(
            values=values.masked_fill(~enough.unsqueeze(-1), 0.0),
            current=current,
            allocated=torch.cat([torch.full((len(group.sites),), group.r) for group in groups]),
            costs=torch.tensor([site.parameters_per_rank for group in groups for site in group.sites]),
        )

    def _averaged(self, values: Tensor) -> Tensor:
        """Move the running average of the spectra `[L, r]`, which starts with the first that is there."""
        if self.energy_ema == 0.0:
            return values
        if self.rule.averages_energy_share:
            total = values.sum(-1, keepdim=True)
            values = values / torch.where(total > 0, total, 1.0)
        before = values if self._average is None else self._average
        before = torch.where(before.sum(-1, keepdim=True) > 0, before, values)
        fresh = values.sum(-1, keepdim=True) > 0
        self._average = torch.where(fresh, self.energy_ema * before + (1.0 - self.energy_ema) * values, before)
        return self._average

    def _raise_regrown_ranks(
        self, geometry: RankSpaceGeometry, layers: LayerSpectra, proposal: RankProposal
    ) -> RankProposal:
        """Raise layers that the rule would not lower and whose dropped directions promise more than the kept ones."""
        if self.return_ratio is None or not bool((layers.current < layers.allocated).any()):
            return proposal
        gains = [
            row
            for group in geometry.groups
            for row in F.regrowth(group.a_cov.cpu(), group.statistics.gradient_gram.cpu(), group.ranks).gain
        ]
        ranks, reasons = list(proposal.ranks), list(proposal.reasons)
        for index, (gain, old) in enumerate(zip(gains, layers.current.tolist(), strict=True)):
            promising = int((gain > self.return_ratio).sum())
            new = min(old + promising, self.guards.max_rank or len(gain))
            if ranks[index] >= old and new > ranks[index]:
                ranks[index] = new
                largest = float(gain.max())
                reasons[index] = f"gain {largest:.3g} of a dropped direction > return_ratio {self.return_ratio:g}"
        return RankProposal(ranks, reasons)

    def _mix(self, names: list[str], ranks: Tensor, eligible: Tensor, widest: int) -> dict[str, int]:
        """Draw, by layer, the kept coordinate that is masked; layers that are not eligible keep all."""
        if self.mixing_probability == 0.0:
            return {}
        mask = F.subspace_mixing_mask(ranks, widest, self.mixing_probability, self._generator)
        masked = F.rank_mask(ranks, widest) & ~mask & eligible.unsqueeze(-1)
        return {names[layer]: coordinate for layer, coordinate in masked.nonzero().tolist()}

    # Persistence.

    def state_dict(self) -> dict[str, Any]:
        """Return averages, spectra of dropped directions and generator: a resumed run chooses as the uninterrupted one."""
        return {
            "average": self._average,
            "dropped_spectrum": self._dropped_spectrum,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._average, self._dropped_spectrum = state["average"], state["dropped_spectrum"]
        self._generator.set_state(state["generator"].cpu())
