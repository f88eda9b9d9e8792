"""From what a rule wants to the rank a layer gets, on plain tensors.

Proven here: a rank falls only to what the rule allows with its margin and rises only if the rule is sure, each with its
reason; bounds win over the rule and say so; the entropy floor keeps a spread spectrum; a layer without a spectrum keeps its
rank.
"""

from __future__ import annotations

import math

import pytest
import torch

from grit_lightning.geometry.rank_proposal import RankGuards, RankProposal
from grit_lightning.geometry.rank_rules import RANK_RULES, LayerSpectra


def layer(values: list[float], current: int) -> LayerSpectra:
    r = len(values)
    return LayerSpectra(torch.tensor([values]), torch.tensor([current]), torch.tensor([r]), torch.tensor([10]))


def proposed(name: str, limit: float, values: list[float], current: int, **guards: float | None) -> tuple[int, str]:
    settings = RankGuards(**guards)  # type: ignore[arg-type]
    proposal = settings.propose(RANK_RULES[name](limit), layer(values, current))
    assert isinstance(proposal, RankProposal)
    return proposal.ranks[0], proposal.reasons[0]


CURVE = [4.0, 3.0, 2.0, 1.0]  # E = 0.4, 0.7, 0.9, 1.0


@pytest.mark.parametrize(
    ("current", "threshold", "expected"),
    [
        (4, 0.84, (3, "energy 0.900 ≥ τ 0.89 at k=3")),
        (4, 0.88, (4, "held by hysteresis")),  # the rule says 3, but 0.90 does not clear 0.93
        (2, 0.73, (2, "held by hysteresis")),  # the rule says 3, but 0.70 is above 0.68
        (2, 0.76, (3, "energy 0.700 < τ 0.71 at k=2")),
        (3, 0.88, (3, "rule holds")),
    ],
)
def test_a_rank_moves_only_past_the_margin(current: int, threshold: float, expected: tuple[int, str]) -> None:
    assert proposed("energy", threshold, CURVE, current, hysteresis=0.05) == expected


def test_the_margin_of_a_budget_is_relative_to_it() -> None:
    values = [4.0, 1.0, 0.2, 0.04]  # the last direction costs ½ · 0.04 = 0.02
    assert proposed("kl_budget", 0.021, values, 4, hysteresis=0.1) == (4, "held by hysteresis")
    assert proposed("kl_budget", 0.023, values, 4, hysteresis=0.1)[0] == 3
    assert proposed("kl_budget", 0.019, values, 3, hysteresis=0.1) == (3, "held by hysteresis")
    assert proposed("kl_budget", 0.017, values, 3, hysteresis=0.1)[0] == 4


@pytest.mark.parametrize(
    ("values", "guards", "expected"),
    [
        ([100.0, 1.0, 0.0, 0.0], {"min_rank": 2}, (2, "floor min_rank")),
        ([1.0, 1.0, 1.0, 1.0], {"max_rank": 3}, (3, "cap max_rank")),
        ([1.0, 1.0, 1.0, 1.0], {"min_rank": 6}, (4, "rule holds")),  # no more than the adapter has
        ([0.0, 0.0, 0.0, 0.0], {"max_rank": 2}, (4, "no spectrum yet")),
    ],
)
def test_bounds_win_over_the_rule(values: list[float], guards: dict[str, int], expected: tuple[int, str]) -> None:
    assert proposed("energy", 0.9, values, 4, **guards) == expected


def test_the_entropy_floor_keeps_a_spread_spectrum() -> None:
    values = [5.0, 4.0, 3.0, 2.0]
    directions = math.exp(-sum(value / 14 * math.log(value / 14) for value in values))
    assert 3 < directions < 4
    assert proposed("energy", 0.5, values, 4, entropy_floor=True) == (4, "floor entropy")
    assert proposed("energy", 0.5, values, 4)[0] == 2
    assert proposed("energy", 0.5, values, 4, entropy_floor=True, max_rank=3)[0] == 3
