"""Rank rules on covariances made by hand, what stays on their account, how ranks rise again, and exact resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from grit_lightning import GeometryConfig, GritLitModule, RankSpaceGeometry
from grit_lightning import functional as F
from grit_lightning.callbacks import RankAdaptation, Reprojection
from grit_lightning.runs.metrics_log import JSONLinesLogger

Factory = Callable[..., Any]


def rotated(spectra: list[list[float]], seed: int = 0) -> Tensor:
    """Symmetric matrices `[L, r, r]` with these eigenvalues in random directions."""
    values = torch.tensor(spectra)
    noise = torch.randn(*values.shape, values.shape[-1], generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(noise).Q
    return (q * values.unsqueeze(-2)) @ q.mT


def observe(geometry: RankSpaceGeometry, a_cov: Tensor, g_cov: Tensor) -> None:
    """Put covariances in place of measured ones."""
    (group,) = geometry.groups
    group.total.a, group.total.g, group.total.weight = a_cov.clone(), g_cov.clone(), torch.ones(len(group.sites))
    group.tokens += 1000


@pytest.fixture
def geometry(make_tiny_llama: Factory, lora_config: Factory) -> RankSpaceGeometry:
    """Four layers of rank 4 with random factors and no statistics."""
    model = get_peft_model(make_tiny_llama(), lora_config()).double()
    geometry = RankSpaceGeometry(model, GeometryConfig(kfac_min_samples=10))
    for site in geometry.groups[0].sites:
        nn.init.normal_(site.up.weight)
    return geometry


def updates(geometry: RankSpaceGeometry) -> list[Tensor]:
    return [site.up.weight.detach() @ site.down.weight.detach() for site in geometry.groups[0].sites]


def sigma(geometry: RankSpaceGeometry) -> Tensor:
    """Balanced σ by their definition: roots of the eigenvalues of Σ_a Σ_g."""
    (group,) = geometry.groups
    values = torch.linalg.eigvals(group.a_cov.double() @ group.g_cov.double()).real.clamp(min=0)
    return values.sqrt().sort(descending=True).values


def decided(callback: RankAdaptation, geometry: RankSpaceGeometry, step: int = 1) -> list[int]:
    callback.adapt(geometry, step)
    return list(geometry.ranks.values())


SPECTRA = [[6.0, 3.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [100.0, 0.0, 0.0, 0.0], [8.0, 1.5, 0.4, 0.1]]


def test_the_energy_rule_on_known_spectra(geometry: RankSpaceGeometry) -> None:
    observe(geometry, rotated(SPECTRA), rotated(SPECTRA, 1))
    assert decided(RankAdaptation(threshold=0.9, min_rank=1), geometry) == [2, 4, 1, 2]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("rule", ["balanced", "kl_budget"])
def test_a_cut_costs_what_the_rule_allows_and_one_direction_more_would_not_fit(
    geometry: RankSpaceGeometry, rule: Any, scope: Any
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
    geometry: RankSpaceGeometry, settings: dict[str, Any]
) -> None:
    spectra = [[4.0, 2.0, 1.0, 0.7]] * 4
    observe(geometry, rotated(spectra), rotated(spectra, 1))
    callback = RankAdaptation(min_rank=1, **settings)
    first = decided(callback, geometry)
    assert max(first) < 4
    for step in range(5):
        assert decided(callback, geometry, step) == first


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("rule", ["energy", "balanced", "kl_budget"])
def test_ranks_under_a_change_of_gauge(geometry: RankSpaceGeometry, rule: Any, scope: Any) -> None:
    """(A, B) and (TA, BT⁻¹) are one model: σ sees that, the eigenvalues of Σ_a do not."""
    if (rule, scope) == ("energy", "global"):
        with pytest.raises(ValueError, match=r"RankAdaptation\.scope must be layer with rule energy"):
            RankAdaptation(rule, scope=scope)
        return
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


def test_the_average_is_that_of_the_energy_curve(geometry: RankSpaceGeometry) -> None:
    callback = RankAdaptation(threshold=0.9, min_rank=1, energy_ema=0.75)
    curves = [[[0.5, 0.3, 0.1, 0.1]] * 4, [[1.0, 0.0, 0.0, 0.0]] * 4]
    observe(geometry, 10 * rotated(curves[0]), torch.eye(4).expand(4, 4, 4))
    assert decided(callback, geometry) == [3] * 4
    # 0.75·(0.5, 0.8, 0.9, 1) + 0.25 = 0.625, 0.85, 0.925: still 3; once more 0.719, 0.8875, 0.944; then 0.789, 0.916: 2
    for expected in (3, 3, 2):
        observe(geometry, 7 * rotated(curves[1]), torch.eye(4).expand(4, 4, 4))
        assert decided(callback, geometry) == [expected] * 4
    assert decided(RankAdaptation(threshold=0.9, min_rank=1), geometry) == [1] * 4


@pytest.mark.parametrize("rule", ["energy", "kl_budget"])
def test_hysteresis_holds_and_says_so(geometry: RankSpaceGeometry, rule: Any) -> None:
    identity = torch.eye(4).expand(4, 4, 4)
    # Costs of the last direction ½·0.04 = 0.02 and of the last two 0.12; energies 0.9615 at 3.
    spectrum = [[4.0, 1.0, 0.2, 0.04]] * 4 if rule == "kl_budget" else [[3.0, 1.5, 0.3, 0.2]] * 4
    settings: dict[str, Any] = {"rule": rule, "min_rank": 1, "return_ratio": None}
    settings |= {"budget": 0.021} if rule == "kl_budget" else {"threshold": 0.95}
    observe(geometry, rotated(spectrum), identity)
    callback = RankAdaptation(**settings, hysteresis=0.1 if rule == "kl_budget" else 0.02)
    changes, unchanged, _ = callback.adapt(geometry, 1)
    assert not changes
    assert unchanged == {"held by hysteresis": 4}
    assert decided(RankAdaptation(**settings), geometry) == [3] * 4


def test_every_bound_and_its_reason(geometry: RankSpaceGeometry) -> None:
    identity = torch.eye(4).expand(4, 4, 4)
    few = RankAdaptation(min_samples=5000)
    observe(geometry, rotated(SPECTRA), identity)
    assert few.adapt(geometry, 1) == ([], {"too few samples": 4}, [])
    observe(geometry, 0 * identity, identity)
    assert RankAdaptation().adapt(geometry, 1)[1] == {"no spectrum yet": 4}

    observe(geometry, rotated([[100.0, 1.0, 0.0, 0.0], [5.0, 5.0, 5.0, 1.0], [1.0] * 4, [1.0] * 4]), identity)
    callback = RankAdaptation(threshold=0.9, min_rank=2, max_rank=3, every_n_steps=1)
    changes, unchanged, _ = callback.adapt(geometry, 7)
    assert [(change.step, change.old, change.new, change.reason) for change in changes] == [
        (7, 4, 2, "floor min_rank"),
        (7, 4, 3, "energy 0.938 ≥ τ 0.9 at k=3"),
        (7, 4, 3, "cap max_rank"),
        (7, 4, 3, "cap max_rank"),
    ]
    assert [change.layer for change in changes] == list(geometry.layers)
    assert list(callback.decisions) == changes
    assert unchanged == {}
    assert callback.adapt(geometry, 8)[1] == {"floor min_rank": 1, "rule holds": 1, "cap max_rank": 2}


def test_the_entropy_floor_keeps_a_spread_spectrum(geometry: RankSpaceGeometry) -> None:
    observe(geometry, rotated([[5.0, 4.0, 3.0, 2.0]] * 4), torch.eye(4).expand(4, 4, 4))
    callback = RankAdaptation(threshold=0.5, min_rank=1, entropy_floor=True)
    changes, unchanged, _ = callback.adapt(geometry, 1)  # exp(H) = 3.7
    assert not changes
    assert unchanged == {"floor entropy": 4}
    assert decided(RankAdaptation(threshold=0.5, min_rank=1), geometry) == [2] * 4


def test_mixing_zeroes_one_kept_direction_and_keeps_the_rank(geometry: RankSpaceGeometry) -> None:
    observe(geometry, rotated(SPECTRA[1:2] * 4), torch.eye(4).expand(4, 4, 4))
    before = updates(geometry)
    _, _, mixed = RankAdaptation(min_rank=1, mixing_probability=1.0, seed=3).adapt(geometry, 1)
    assert mixed == sorted(geometry.layers)
    assert set(geometry.ranks.values()) == {4}
    for old, new, site in zip(before, updates(geometry), geometry.groups[0].sites, strict=True):
        assert int((site.up.weight == 0).all(0).sum()) == 1
        assert torch.linalg.matrix_rank(new, rtol=1e-5) == 3
        assert torch.linalg.matrix_rank(old - new, rtol=1e-5) == 1


def test_mixing_draws_by_seed_and_resumes(geometry: RankSpaceGeometry) -> None:
    observe(geometry, rotated(SPECTRA[1:2] * 4), torch.eye(4).expand(4, 4, 4))

    def draws(callback: RankAdaptation, n: int) -> list[list[int]]:
        mixed = [callback.adapt(geometry, step)[2] for step in range(n)]
        return [[index for index, name in enumerate(geometry.layers) if name in names] for names in mixed]

    def fresh(seed: int = 0) -> RankAdaptation:
        return RankAdaptation(min_rank=1, mixing_probability=0.5, seed=seed)

    callback = fresh()
    first, state = draws(callback, 3), callback.state_dict()
    assert draws(fresh(), 3) == first != draws(fresh(1), 3)
    resumed = fresh()
    resumed.load_state_dict(state)
    assert draws(resumed, 6) == draws(callback, 6)


# Dropped directions, on a task whose data change.


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


RULES: dict[str, dict[str, Any]] = {
    "energy": {"rule": "energy", "threshold": 0.97},
    "balanced": {"rule": "balanced", "threshold": 0.9},
    "kl_budget": {"rule": "kl_budget", "budget": 0.02},
}


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
    geometry: RankSpaceGeometry,
) -> None:
    observe(geometry, rotated(SPECTRA[1:2] * 4), rotated(SPECTRA[1:2] * 4, 1))
    (group,) = geometry.groups
    geometry.set_ranks(lambda a, g, kept, _: F.balanced_maps(a, g, kept), dict.fromkeys(geometry.layers, 2))
    group.gradient_gram = torch.diag(torch.tensor([1.0, 1.0, 0.5, 9.0])).expand(4, 4, 4).clone()
    third, before = group.sites[0].down.weight[3].detach().clone(), updates(geometry)
    changes, _, _ = RankAdaptation("balanced", threshold=1.0, min_rank=1).adapt(geometry, 1)
    assert {(change.old, change.new) for change in changes} == {(2, 3)}
    assert "> return_ratio 2" in changes[0].reason
    for old, new in zip(before, updates(geometry), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-9)
    cosine = torch.nn.functional.cosine_similarity(group.sites[0].down.weight[2].detach(), third, dim=0)
    assert float(cosine) > 0.99


# Under a Trainer.


@pytest.mark.parametrize("settings", [*RULES.values(), {"rule": "balanced", "threshold": 0.8, "scope": "global"}])
def test_a_run_logs_its_decisions_and_resumes_exactly(
    make_module: Factory, make_trainer: Factory, loader: Factory, tmp_path: Path, settings: dict[str, Any]
) -> None:
    def run(folder: Path, ckpt: Path | None = None) -> tuple[GritLitModule, RankAdaptation, Any]:
        torch.manual_seed(4)
        callback = RankAdaptation(
            min_rank=1, every_n_steps=1, hysteresis=0.01, energy_ema=0.5, entropy_floor=True, max_rank=3,
            mixing_probability=0.3, seed=5, **settings,
        )  # fmt: skip
        reprojection = Reprojection("balanced", every_n_steps=2, trigger="angle_drift", max_drift=0.01)
        saving = ModelCheckpoint(
            tmp_path / "checkpoints", "{step}", every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1
        )
        module = make_module(GeometryConfig(kfac_update_freq=2, kfac_min_samples=8))
        trainer = make_trainer(
            callbacks=[callback, reprojection, saving],
            max_epochs=2,
            logger=JSONLinesLogger(folder),
            enable_checkpointing=True,
        )
        trainer.fit(module, loader(4), loader(1), ckpt_path=ckpt, weights_only=True)
        return module, callback, trainer

    module, callback, trainer = run(tmp_path / "whole")
    assert "grit/rank_changes" in trainer.callback_metrics
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")  # with what was written after the checkpoint
    resumed, _, _ = run(tmp_path / "parts", tmp_path / "checkpoints" / "step=4.ckpt")
    for (name, p), q in zip(module.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert resumed.geometry.ranks == module.geometry.ranks
    lines = (tmp_path / "whole" / "ranks.jsonl").read_text().splitlines()
    assert lines == (tmp_path / "parts" / "ranks.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    changes = [event for event in events if "layer" in event]
    assert [tuple(change.values()) for change in changes] == [tuple(change) for change in callback.decisions]
    assert changes
    summaries = [event for event in events if "unchanged" in event]
    assert [event["step"] for event in summaries] == list(range(1, 9))
    assert all(event["changed"] + sum(event["unchanged"].values()) == 4 for event in summaries)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "other"}, "rule must be energy, balanced or kl_budget"),
        ({"rule": "kl_budget"}, r"budget must be a number ≥ 0 \(nats per token\) with rule kl_budget, got None"),
        ({"rule": "kl_budget", "budget": -1.0}, "budget must be a number ≥ 0"),
        ({"budget": 0.1}, "budget must be null with rule energy, got 0.1"),
        ({"scope": "all"}, "scope must be layer or global"),
        ({"hysteresis": 1.0}, r"hysteresis \(ε\) must lie in"),
        ({"min_rank": 4, "max_rank": 2}, "max_rank must be ≥ min_rank 4"),
        ({"min_samples": 0}, "min_samples must be"),
        ({"energy_ema": 1.0}, r"energy_ema \(β\) must lie in"),
        ({"mixing_probability": 2.0}, "mixing_probability must lie in"),
        ({"rule": "balanced", "return_ratio": 0.5}, "return_ratio must be"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankAdaptation(**settings)


def test_a_sample_gate_below_the_geometrys_is_refused(geometry: RankSpaceGeometry) -> None:
    with pytest.raises(ValueError, match=r"min_samples is 5, but .* 10 tokens.*kfac_min_samples"):
        RankAdaptation(min_samples=5).validate(geometry)
