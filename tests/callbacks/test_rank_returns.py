"""How a direction that was dropped comes back: on a task whose data change, and on covariances made by hand.

Proven here: under every rule, ranks rise again when the data need it; under rules of σ only B's gradient can tell that; what
a reprojection drops returns unless its row of A was zeroed too; a raise leaves the adapter's function as it is and takes the
direction with the most gradient first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from grit_lightning import GeometryConfig, RankSpaceGeometry
from grit_lightning import functional as F
from grit_lightning.callbacks import RankAdaptation, Reprojection

Factory = Callable[..., Any]

RULES: dict[str, dict[str, Any]] = {
    "energy": {"rule": "energy", "threshold": 0.97},
    "balanced": {"rule": "balanced", "threshold": 0.9},
    "kl_budget": {"rule": "kl_budget", "budget": 0.02},
}


class Linear(nn.Module):
    """One layer, so that everything about it can be said: y = W x, W frozen at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8, bias=False)
        nn.init.zeros_(self.q_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.q_proj(x)
        return result


class Task:
    """Trains y = x + noise on Gaussian x whose first `width` coordinates are not zero; the noise costs a loss of 1."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = get_peft_model(Linear(), LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]))
        self.geometry = RankSpaceGeometry(self.model, GeometryConfig(kfac_update_freq=10, kfac_min_samples=1))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.02)
        self.generator = torch.Generator().manual_seed(2)

    def train(self, width: int, steps: int, act: Callable[[int], object]) -> float:
        losses = []
        for step in range(1, steps + 1):
            x = torch.randn(1, 32, 8, generator=self.generator) * (torch.arange(8) < width)
            self.geometry.start_micro_batch(torch.ones(1, 32), 32.0)
            self.optimizer.zero_grad()
            target = x + 0.5 * torch.randn(x.shape, generator=self.generator)
            loss = (self.model(x) - target).square().sum(-1).mean() / 2
            loss.backward()
            self.geometry.finish_micro_batch()
            self.geometry.step()
            self.optimizer.step()
            losses.append(float(loss.detach()))
            if step % 20 == 0:
                act(step)
        return sum(losses[-20:]) / 20

    @property
    def rank(self) -> int:
        return next(iter(self.geometry.ranks.values()))


@pytest.mark.parametrize("rule", RULES)
def test_a_dropped_direction_comes_back_when_the_data_change(rule: str) -> None:
    task, callback = Task(), RankAdaptation(min_rank=1, **RULES[rule])

    def act(step: int) -> None:
        callback.adapt(task.geometry, step, task.optimizer)

    task.train(1, 200, act)
    assert task.rank == 1
    loss = task.train(3, 400, act)
    assert task.rank >= 3
    assert loss < 1.2  # 1 is the noise, 2 the best that rank 1 can do
    assert any(change.new > change.old for change in callback.decisions)


@pytest.mark.parametrize("rule", ["balanced", "kl_budget"])
def test_without_the_gradients_evidence_a_direction_of_zero_sigma_stays_dropped(rule: str) -> None:
    task, callback = Task(), RankAdaptation(min_rank=1, return_ratio=None, **RULES[rule])

    def act(step: int) -> None:
        callback.adapt(task.geometry, step, task.optimizer)

    task.train(1, 200, act)
    loss = task.train(3, 400, act)
    assert task.rank == 1
    assert loss > 1.8


@pytest.mark.parametrize("mode", ["one_sided", "two_sided", "balanced"])
@pytest.mark.parametrize("keep_dropped", [True, False])
def test_what_a_reprojection_drops_can_return_unless_its_row_is_zeroed(mode: Any, keep_dropped: bool) -> None:
    task = Task()
    adapt = RankAdaptation("balanced", 0.9, 1)
    task.train(1, 100, lambda _: None)
    Reprojection(mode, k=1, keep_dropped=keep_dropped).reproject(task.geometry, task.optimizer)
    assert task.rank == 1
    task.train(3, 400, lambda step: adapt.adapt(task.geometry, step, task.optimizer))
    if keep_dropped or mode == "balanced":
        assert task.rank >= 3
    else:
        (site,) = task.geometry.groups[0].sites
        assert task.rank == 1
        assert bool((site.down.weight[1:] == 0).all())


def test_a_raise_keeps_the_function_and_takes_the_direction_with_the_most_gradient_first(
    geometry: RankSpaceGeometry, observe: Factory, updates: Factory
) -> None:
    observe(geometry, torch.eye(4))
    (group,) = geometry.groups
    geometry.set_ranks(lambda a, g, kept, _: F.balanced_maps(a, g, kept), dict.fromkeys(geometry.layers, 2))
    group.statistics.gradient_gram = torch.diag(torch.tensor([1.0, 1.0, 0.5, 9.0])).expand(4, 4, 4).clone()
    third, before = group.sites[0].down.weight[3].detach().clone(), updates(geometry)
    changes, _, _ = RankAdaptation("balanced", threshold=1.0, min_rank=1).adapt(geometry, 1)
    assert {(change.old, change.new) for change in changes} == {(2, 3)}
    assert "> return_ratio 2" in changes[0].reason
    for old, new in zip(before, updates(geometry), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-9)
    cosine = torch.nn.functional.cosine_similarity(group.sites[0].down.weight[2].detach(), third, dim=0)
    assert float(cosine) > 0.99
