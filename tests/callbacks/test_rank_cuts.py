"""What a cut by RankAdaptation costs, on covariances made by hand.

Proven here: the predicted loss of a cut, worked out from what became of ΔW, is within what the rule allows, and one direction
less would not be; further decisions do not spend the allowance again; ranks do not depend on the gauge where the rule's
spectrum does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grit_lightning import RankSpaceGeometry
from grit_lightning import functional as F
from grit_lightning.callbacks import RankAdaptation
from grit_lightning.geometry.rank_rules import RANK_RULES

Factory = Callable[..., Any]

SPECTRA = [[6.0, 3.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [100.0, 0.0, 0.0, 0.0], [8.0, 1.5, 0.4, 0.1]]


def sigma(geometry: RankSpaceGeometry) -> Tensor:
    """Balanced σ by their definition: roots of the eigenvalues of Σ_a Σ_g."""
    (group,) = geometry.groups
    values = torch.linalg.eigvals(group.a_cov.double() @ group.g_cov.double()).real.clamp(min=0)
    return values.sqrt().sort(descending=True).values


def decided(callback: RankAdaptation, geometry: RankSpaceGeometry, step: int = 1) -> list[int]:
    callback.adapt(geometry, step)
    return list(geometry.ranks.values())


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("rule", ["balanced", "kl_budget"])
def test_a_cut_costs_what_the_rule_allows_and_one_direction_more_would_not_fit(
    geometry: RankSpaceGeometry, rule: Any, scope: Any, observe: Factory, rotated: Factory
) -> None:
    spectra = [[6.0, 3.0, 1.0, 0.2], [2.0, 1.0, 1.0, 1.0], [7.0, 0.5, 0.3, 0.1], [4.0, 1.5, 0.4, 0.1]]
    observe(geometry, rotated(spectra), rotated(spectra[::-1], 1))
    (group,) = geometry.groups
    old = [(site.up.weight.detach().clone(), site.down.weight.detach().clone()) for site in group.sites]
    a_cov, g_cov, losses = group.a_cov.double(), group.g_cov.double(), 0.5 * sigma(geometry).square()
    share = 0.1 if rule == "balanced" else 0.05
    total = losses.sum() if scope == "global" else losses.sum(-1)
    budget = share * float(losses.sum()) if rule == "kl_budget" else None
    allowed = share * total if budget is None else torch.as_tensor(budget)
    ranks = decided(RankAdaptation(rule, 0.9, 1, budget=budget, scope=scope), geometry)
    costs = []
    for index, (site, (up, down)) in enumerate(zip(group.sites, old, strict=True)):
        # E = I − M from what became of ΔW, its cost under F = Σ_g ⊗ Σ_a from the definition.
        e = torch.eye(4) - torch.linalg.pinv(up) @ site.up.weight.detach() @ site.down.weight @ torch.linalg.pinv(down)
        costs.append(0.5 * torch.trace(e.T @ g_cov[index] @ e @ a_cov[index]).detach())
        assert float(costs[-1]) == pytest.approx(float(losses[index, ranks[index] :].sum()), rel=1e-3, abs=1e-6)
    spent = torch.stack(costs)
    next_loss = torch.stack([losses[index, rank - 1] for index, rank in enumerate(ranks)])
    could_fall = torch.tensor(ranks) > 1
    assert bool((torch.tensor(ranks) < 4).any())
    if scope == "layer":
        assert bool((spent <= allowed * 1.001).all())
        assert bool((spent + next_loss > allowed)[could_fall].all())
    else:
        assert float(spent.sum()) <= float(allowed) * 1.001
        assert bool((spent.sum() + next_loss > allowed)[could_fall].any())


@pytest.mark.parametrize("settings", [{"rule": "balanced", "threshold": 0.9}, {"rule": "kl_budget", "budget": 1.0}])
def test_further_decisions_do_not_spend_the_allowance_again(
    geometry: RankSpaceGeometry, settings: dict[str, Any], observe: Factory, rotated: Factory
) -> None:
    spectra = [[4.0, 2.0, 1.0, 0.7]] * 4
    observe(geometry, rotated(spectra), rotated(spectra, 1))
    callback = RankAdaptation(min_rank=1, **settings)
    first = decided(callback, geometry)
    assert max(first) < 4
    for step in range(5):
        assert decided(callback, geometry, step) == first


@pytest.mark.parametrize(
    ("rule", "scope"),
    [(name, scope) for name in RANK_RULES for scope in ("layer", "global") if (name, scope) != ("energy", "global")],
)
def test_ranks_under_a_change_of_gauge(
    geometry: RankSpaceGeometry, rule: Any, scope: Any, observe: Factory, rotated: Factory, updates: Factory
) -> None:
    """(A, B) and (TA, BT⁻¹) are one model: σ sees that, the eigenvalues of Σ_a do not."""
    observe(geometry, rotated(SPECTRA) + 0.05 * torch.eye(4), rotated(SPECTRA[::-1], 1) + 0.05 * torch.eye(4))
    state = geometry.state_dict()

    def ranks(t: Tensor) -> list[int]:
        geometry.load_state_dict(state)
        geometry.reproject(lambda *_: F.ReprojectionMaps(t, torch.linalg.inv(t)))
        budget = 0.3 if rule == "kl_budget" else None
        return decided(RankAdaptation(rule, 0.9, 1, budget=budget, scope=scope), geometry)

    before = updates(geometry)
    found = ranks(torch.eye(4))
    skewed = ranks(torch.tensor([[2.0, 0.3, 0, 0], [0, 1, 0, 0.5], [0, 0, 0.4, 0], [0, 0, 0, 0.3]]))
    assert (found == skewed) == (rule != "energy")
    assert any(not torch.equal(old, new) for old, new in zip(before, updates(geometry), strict=True))
