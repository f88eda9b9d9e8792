"""From spectra to ranks: which rule, which bounds, and the reason in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from grit_lightning import functional as F

Rule = Literal["energy", "balanced", "kl_budget"]
Scope = Literal["layer", "global"]


class Layers(NamedTuple):
    """What a rule has to know of all L layers, on the CPU; spectra are padded with zeros to the largest r."""

    values: Tensor
    """`[L, r]` descending: eigenvalues of Σ_a (`energy`) or balanced σ²."""
    current: Tensor
    """`[L]` int64, ranks in force."""
    allocated: Tensor
    """`[L]` int64, LoRA ranks r."""
    costs: Tensor
    """`[L]` int64, parameters of one direction, d_in + d_out."""


class Verdict(NamedTuple):
    """What a rule says of each layer."""

    ranks: list[int]
    reasons: list[str]


@dataclass(frozen=True)
class RankRule:
    """The rank rules of `RankAdaptation`, without state; see there for the settings.

    A rule is asked three times: at its threshold τ, at τ + ε and at τ − ε (for a budget b: b, b(1 − ε), b(1 + ε)). The
    rank falls to what the strict answer allows, rises to what the plain one wants if even the loose one wants more than
    there is, and otherwise stays.
    """

    rule: Rule
    scope: Scope
    threshold: float
    budget: float
    min_rank: int
    max_rank: int | None
    hysteresis: float
    entropy_floor: bool

    def __call__(self, layers: Layers) -> Verdict:
        """Return the rank every layer should have, and why; layers without a spectrum keep theirs."""
        current = layers.current
        cap = layers.allocated if self.max_rank is None else layers.allocated.clamp(max=self.max_rank)
        floor = cap.clamp(max=self.min_rank)
        bound = floor
        if self.entropy_floor:
            bound = torch.maximum(floor, F.entropy_floor_rank(layers.values, 0, cap))
        lowest = int(floor.min())
        strict, plain, loose = (self._ask(layers, cap, lowest, shift * self.hysteresis) for shift in (1, 0, -1))
        free = self._ask(layers, layers.allocated, 0, 0.0)
        wanted = torch.where(loose > current, torch.maximum(plain, current), torch.minimum(strict, current))
        ranks = torch.minimum(torch.maximum(wanted, bound), cap)
        known = layers.values[:, 0] > 0
        ranks = torch.where(known, ranks, current)
        reasons = []
        for index, (old, new) in enumerate(zip(current.tolist(), ranks.tolist(), strict=True)):
            if not known[index]:
                reasons.append("no spectrum yet")
            elif new == int(bound[index]) and int(free[index]) < new:
                reasons.append("floor min_rank" if new == int(floor[index]) else "floor entropy")
            elif new == int(cap[index]) < int(free[index]):
                reasons.append("cap max_rank")
            elif new == old:
                reasons.append("held by hysteresis" if int(plain[index]) != old else "rule holds")
            else:
                reasons.append(self._explain(layers.values[index : index + 1], old, new))
        return Verdict(ranks.tolist(), reasons)

    def _ask(self, layers: Layers, cap: Tensor, lowest: int, shift: float) -> Tensor:
        if self.rule == "kl_budget":
            sigma, budget = layers.values.sqrt(), self.budget * (1.0 - shift)
            if self.scope == "global":
                return F.global_budget_rank(sigma, budget, layers.costs, lowest, cap)
            return F.budget_rank(sigma, budget, lowest, cap)
        threshold = min(max(self.threshold + shift, 1e-6), 1.0)
        if self.scope == "global":
            return F.global_energy_rank(layers.values, threshold, layers.costs, lowest, cap)
        return F.rank_from_energy(F.cumulative_energy(layers.values), threshold, lowest, cap)

    def _explain(self, values: Tensor, old: int, new: int) -> str:
        falls = new < old
        k = new if falls else old
        where = "over all layers, here at" if self.scope == "global" else "at"
        shift = self.hysteresis if falls else -self.hysteresis
        if self.rule == "kl_budget":
            cost = float(F.truncation_cost(values.sqrt(), k))
            return f"cost {cost:.3g} {'≤' if falls else '>'} budget {self.budget * (1 - shift):.3g} {where} k={k}"
        energy = float(F.cumulative_energy(values)[0, k - 1])
        if self.scope == "global":
            return (
                f"energy kept at τ {min(self.threshold + shift, 1):g} {where} k={new} (this layer's was {energy:.3f})"
            )
        return f"energy {energy:.3f} {'≥' if falls else '<'} τ {min(self.threshold + shift, 1):g} {where} k={k}"
