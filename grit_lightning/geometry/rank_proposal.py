"""From what a rule wants to the rank that every layer should have: bounds, hysteresis, and the reason in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grit_lightning import functional as F
from grit_lightning.geometry.rank_rules import LayerSpectra, RankRule


class RankProposal(NamedTuple):
    """The rank that every layer should have, and why."""

    ranks: list[int]
    reasons: list[str]


@dataclass(frozen=True)
class RankGuards:
    """What keeps a rule from moving ranks too far or too often.

    Args:
        min_rank: Smallest effective rank; layers whose r is smaller keep their r.
        max_rank: Largest effective rank; None allows the adapter's.
        hysteresis: ε, the margin by which a rule must be sure; see `RankRule.ranks`.
        entropy_floor: Keep at least exp(entropy of the spectrum) directions.
    """

    min_rank: int = 1
    max_rank: int | None = None
    hysteresis: float = 0.0
    entropy_floor: bool = False

    def propose(self, rule: RankRule, layers: LayerSpectra) -> RankProposal:
        """Return the rank every layer should have, and why; layers without a spectrum keep theirs."""
        cap = layers.allocated if self.max_rank is None else layers.allocated.clamp(max=self.max_rank)
        floor = cap.clamp(max=self.min_rank)
        bound = floor
        if self.entropy_floor:
            bound = torch.maximum(floor, F.entropy_floor_rank(layers.values, 0, cap))
        lowest = int(floor.min())
        strict, plain, loose = (rule.ranks(layers, cap, lowest, sign * self.hysteresis) for sign in (1, 0, -1))
        wanted = F.rank_with_hysteresis(layers.current, strict, plain, loose)
        known = layers.values[:, 0] > 0
        ranks = torch.where(known, torch.minimum(torch.maximum(wanted, bound), cap), layers.current)
        return RankProposal(ranks.tolist(), self._reasons(rule, layers, ranks, plain, floor, bound, cap))

    def _reasons(
        self,
        rule: RankRule,
        layers: LayerSpectra,
        ranks: Tensor,
        plain: Tensor,
        floor: Tensor,
        bound: Tensor,
        cap: Tensor,
    ) -> list[str]:
        unbounded = rule.ranks(layers, layers.allocated, 0)
        columns = (layers.current, ranks, plain, unbounded, floor, bound, cap)
        reasons = []
        for values, *row in zip(layers.values, *(column.tolist() for column in columns), strict=True):
            old, new, wanted, free, lowest, least, most = row
            if not values[0] > 0:
                reasons.append("no spectrum yet")
            elif free < new == least:
                reasons.append("floor min_rank" if new == lowest else "floor entropy")
            elif new == most < free:
                reasons.append("cap max_rank")
            elif new == old:
                reasons.append("held by hysteresis" if wanted != old else "rule holds")
            else:
                reasons.append(rule.explain(values.unsqueeze(0), old, new, self.hysteresis))
        return reasons
