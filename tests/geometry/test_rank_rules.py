"""Rank rules as they are, on plain tensors: no model, no Trainer.

Proven here, of every rule in the table:
- its spectrum is the one it is named after, worked out in another way;
- what its class says of that spectrum is true: whether a change of gauge leaves it alone, whether a dropped direction still
  shows in it, and which reprojection puts its directions in order;
- its ranks are the smallest within its limit, layer by layer and over all layers, and a margin tightens or loosens it;
- its reason names the number that moved the rank, and the limit that was compared with it.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from grit_lightning import functional as F
from grit_lightning.geometry.rank_rules import RANK_RULES, LayerSpectra, RankRule

LIMITS = {"energy": 0.9, "balanced": 0.9, "kl_budget": 0.3}
NAMES = list(RANK_RULES)
R = 5


def make(name: str, scope: str = "layer") -> RankRule:
    return RANK_RULES[name](LIMITS[name], scope)  # type: ignore[arg-type]


def covariances(seed: int, layers: int = 3) -> Tensor:
    rows = torch.randn(layers, R, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale = 0.6 ** torch.arange(R, dtype=torch.float64)
    return (scale.unsqueeze(-1) * rows) @ (scale.unsqueeze(-1) * rows).mT / 12


def spectra(values: list[list[float]], costs: list[int] | None = None, current: int | None = None) -> LayerSpectra:
    layers, r = len(values), len(values[0])
    full = torch.full((layers,), r)
    in_force = full if current is None else torch.full((layers,), current)
    cost = torch.tensor(costs or [1] * layers)
    return LayerSpectra(torch.tensor(values, dtype=torch.float64), in_force, full, cost)


def wanted(rule: RankRule, layers: LayerSpectra, margin: float = 0.0) -> list[int]:
    return rule.ranks(layers, layers.allocated, 0, margin).tolist()


def discarded(name: str, values: list[float], k: int) -> float:
    """What the rule's limit is about, by definition, for the directions beyond k."""
    tail = math.fsum(values[k:])
    return 0.5 * tail if RANK_RULES[name].needs_budget else tail


def allowed(name: str, values: list[float], margin: float = 0.0) -> float:
    """How much of that may be discarded."""
    if RANK_RULES[name].needs_budget:
        return LIMITS[name] * (1 - margin)
    return (1 - LIMITS[name] - margin) * math.fsum(values)


def test_the_table_offers_three_rules_under_their_names() -> None:
    assert NAMES == ["energy", "balanced", "kl_budget"]
    assert [name for name, rule in RANK_RULES.items() if rule.needs_budget] == ["kl_budget"]
    shares = [
        (name, scope) for name in NAMES for scope in ("layer", "global") if make(name, scope).averages_energy_share
    ]
    assert shares == [("energy", "layer"), ("balanced", "layer")]


@pytest.mark.parametrize("name", NAMES)
def test_the_spectrum_is_that_of_the_rule(name: str) -> None:
    a_cov, g_cov = covariances(0), covariances(1)
    product = a_cov if name == "energy" else a_cov @ g_cov  # σ² are the eigenvalues of Σ_a Σ_g
    expected = torch.linalg.eigvals(product).real.sort(descending=True).values
    torch.testing.assert_close(make(name).spectrum(a_cov, g_cov), expected)


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_compared_only_by_what_a_change_of_gauge_leaves_alone(name: str) -> None:
    """(A, B) and (TA, BT⁻¹) are one model: σ sees that, the eigenvalues of Σ_a do not."""
    rule, a_cov, g_cov = make(name), covariances(0), covariances(1)
    t = torch.eye(R, dtype=torch.float64) + 0.3 * covariances(2)
    back = torch.linalg.inv(t)
    elsewhere = rule.spectrum(t @ a_cov @ t.mT, back.mT @ g_cov @ back)
    assert torch.allclose(elsewhere, rule.spectrum(a_cov, g_cov)) == rule.comparable_between_layers


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_direction_shows_in_the_spectrum_only_where_the_rule_says_so(name: str) -> None:
    """A zeroed column of B leaves Σ_a as it is and takes a row and a column of Σ_g away."""
    kept = torch.arange(R) < 3
    g_cov = covariances(1) * kept * kept.unsqueeze(-1)
    rule = make(name)
    directions = (rule.spectrum(covariances(0), g_cov) > 1e-9).sum(-1)
    assert directions.tolist() == [R if rule.measures_dropped else 3] * 3


@pytest.mark.parametrize("name", NAMES)
def test_the_reprojection_of_the_rule_puts_its_directions_in_order(name: str) -> None:
    rule, a_cov, g_cov = make(name), covariances(0), covariances(1)
    everything, every_layer = torch.ones(3, R, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    maps = F.maps_rule(rule.reprojection_mode)(a_cov, g_cov, everything, every_layer)
    new_a, new_g = maps.a_map @ a_cov @ maps.a_map.mT, maps.b_map.mT @ g_cov @ maps.b_map
    product = new_a if rule.measures_dropped else new_a @ new_g
    torch.testing.assert_close(product, torch.diag_embed(rule.spectrum(a_cov, g_cov)), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("margin", [-0.05, 0.0, 0.05])
@pytest.mark.parametrize("name", NAMES)
def test_a_layers_rank_is_the_smallest_within_its_limit(name: str, margin: float) -> None:
    values = covariances(3, 20).diagonal(dim1=-2, dim2=-1).sort(descending=True).values.tolist()
    expected = [
        next(k for k in range(R + 1) if discarded(name, row, k) <= allowed(name, row, margin) * (1 + 1e-12))
        for row in values
    ]
    assert wanted(make(name), spectra(values), margin) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("name", [name for name, rule in RANK_RULES.items() if rule.comparable_between_layers])
def test_over_all_layers_no_choice_within_the_limit_is_smaller(name: str) -> None:
    values = [[2.0, 1.0, 0.1, 0.02], [1.0, 0.3, 0.2, 0.1], [0.4, 0.1, 0.05, 0.01]]
    total = allowed(name, [value for row in values for value in row])
    ranks = wanted(make(name, "global"), spectra(values))
    fits = [
        ks
        for ks in itertools.product(range(5), repeat=3)
        if sum(discarded(name, row, k) for row, k in zip(values, ks, strict=True)) <= total
    ]
    assert tuple(ranks) in fits
    assert sum(ranks) == min(sum(ks) for ks in fits)
    assert ranks != wanted(make(name), spectra(values))


def test_over_all_layers_cheap_directions_are_kept_first() -> None:
    layers = spectra([[2.0, 0.5], [2.0, 0.5]], costs=[1, 10])
    assert wanted(make("kl_budget", "global"), layers) == [2, 1]


@pytest.mark.parametrize("name", NAMES)
def test_without_a_spectrum_a_layer_keeps_what_its_cap_allows(name: str) -> None:
    layers = spectra([[0.0, 0.0, 0.0]] * 2)
    assert make(name).ranks(layers, torch.tensor([3, 2]), 1).tolist() == [3, 2]


@pytest.mark.parametrize("name", NAMES)
def test_bounds_hold_whatever_the_rule_wants(name: str) -> None:
    layers = spectra([[9.0, 1e-3, 1e-4], [1.0, 1.0, 1.0]])
    assert make(name).ranks(layers, torch.tensor([3, 2]), 2).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("name", "scope", "move", "reason"),
    [
        ("energy", "layer", (4, 2), "energy 0.900 ≥ τ 0.91 at k=2"),  # (6 + 3) / 10
        ("energy", "layer", (1, 3), "energy 0.600 < τ 0.89 at k=1"),
        ("balanced", "layer", (4, 3), "energy 0.980 ≥ τ 0.91 at k=3"),
        ("balanced", "global", (4, 2), "energy kept at τ 0.91 over all layers, here at k=2 (this layer's was 0.900)"),
        ("balanced", "global", (1, 3), "energy kept at τ 0.89 over all layers, here at k=3 (this layer's was 0.600)"),
        ("kl_budget", "layer", (4, 3), "cost 0.1 ≤ budget 0.297 at k=3"),  # ½ · 0.2, and 0.3 · (1 − 0.01)
        ("kl_budget", "layer", (2, 3), "cost 0.5 > budget 0.303 at k=2"),  # ½ · (0.8 + 0.2)
        ("kl_budget", "global", (4, 3), "cost 0.1 ≤ budget 0.297 over all layers, here at k=3"),
    ],
)
def test_the_reason_names_the_number_and_the_limit(name: str, scope: str, move: tuple[int, int], reason: str) -> None:
    values = torch.tensor([[6.0, 3.0, 0.8, 0.2]])
    assert make(name, scope).explain(values, *move, hysteresis=0.01) == reason
