"""RankAdaptation: its settings, its decisions on covariances made by hand, and what a run logs.

Proven here: the paper's rule on known spectra; every guard reaches the rule and gives its reason; the average is that of the
energy curve; mixing zeroes one kept direction and repeats by its seed; a run writes every decision and resumes exactly;
wrong settings are named. What a cut costs is tested in test_rank_cuts, how directions return in test_rank_returns, the
rules themselves in tests/geometry.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from grit_lightning import GeometryConfig, GritLitModule, RankSpaceGeometry
from grit_lightning.callbacks import RankAdaptation, Reprojection
from grit_lightning.runs.metrics_log import JSONLinesLogger

Factory = Callable[..., Any]

SPECTRA = [[6.0, 3.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [100.0, 0.0, 0.0, 0.0], [8.0, 1.5, 0.4, 0.1]]
RULES: dict[str, dict[str, Any]] = {
    "energy": {"rule": "energy", "threshold": 0.97},
    "balanced": {"rule": "balanced", "threshold": 0.9},
    "kl_budget": {"rule": "kl_budget", "budget": 0.02},
}


def decided(callback: RankAdaptation, geometry: RankSpaceGeometry, step: int = 1) -> list[int]:
    callback.adapt(geometry, step)
    return list(geometry.ranks.values())


def test_the_energy_rule_on_known_spectra(geometry: RankSpaceGeometry, observe: Factory, rotated: Factory) -> None:
    observe(geometry, rotated(SPECTRA), rotated(SPECTRA, 1))
    assert decided(RankAdaptation(threshold=0.9, min_rank=1), geometry) == [2, 4, 1, 2]


def test_the_average_is_that_of_the_energy_curve(
    geometry: RankSpaceGeometry, observe: Factory, rotated: Factory
) -> None:
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
def test_hysteresis_holds_and_says_so(
    geometry: RankSpaceGeometry, rule: Any, observe: Factory, rotated: Factory
) -> None:
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


def test_every_bound_and_its_reason(geometry: RankSpaceGeometry, observe: Factory, rotated: Factory) -> None:
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


def test_the_entropy_floor_keeps_a_spread_spectrum(
    geometry: RankSpaceGeometry, observe: Factory, rotated: Factory
) -> None:
    observe(geometry, rotated([[5.0, 4.0, 3.0, 2.0]] * 4), torch.eye(4).expand(4, 4, 4))
    callback = RankAdaptation(threshold=0.5, min_rank=1, entropy_floor=True)
    changes, unchanged, _ = callback.adapt(geometry, 1)  # exp(H) = 3.7
    assert not changes
    assert unchanged == {"floor entropy": 4}
    assert decided(RankAdaptation(threshold=0.5, min_rank=1), geometry) == [2] * 4


def test_mixing_zeroes_one_kept_direction_and_keeps_the_rank(
    geometry: RankSpaceGeometry, observe: Factory, rotated: Factory, updates: Factory
) -> None:
    observe(geometry, rotated(SPECTRA[1:2] * 4), torch.eye(4).expand(4, 4, 4))
    before = updates(geometry)
    _, _, mixed = RankAdaptation(min_rank=1, mixing_probability=1.0, seed=3).adapt(geometry, 1)
    assert mixed == sorted(geometry.layers)
    assert set(geometry.ranks.values()) == {4}
    for old, new, site in zip(before, updates(geometry), geometry.groups[0].sites, strict=True):
        assert int((site.up.weight == 0).all(0).sum()) == 1
        assert torch.linalg.matrix_rank(new, rtol=1e-5) == 3
        assert torch.linalg.matrix_rank(old - new, rtol=1e-5) == 1


def test_mixing_draws_by_seed_and_resumes(geometry: RankSpaceGeometry, observe: Factory, rotated: Factory) -> None:
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
        ({"rule": "other"}, "rule: expected energy, balanced or kl_budget"),
        ({"rule": "kl_budget"}, r"budget: expected a number ≥ 0 \(nats per token\) with rule kl_budget, got None"),
        ({"rule": "kl_budget", "budget": -1.0}, "budget: expected a number ≥ 0"),
        ({"budget": 0.1}, "budget: expected null with rule energy, got 0.1"),
        ({"scope": "global"}, r"scope: expected layer with rule energy \(global takes one of balanced, kl_budget\)"),
        ({"scope": "all"}, "scope: expected layer or global"),
        ({"hysteresis": 1.0}, r"hysteresis \(ε\): expected a number in"),
        ({"min_rank": 4, "max_rank": 2}, "max_rank: expected an integer ≥ min_rank 4"),
        ({"min_samples": 0}, "min_samples: expected"),
        ({"energy_ema": 1.0}, r"energy_ema \(β\): expected a number in"),
        ({"mixing_probability": 2.0}, "mixing_probability: expected a number in"),
        ({"rule": "balanced", "return_ratio": 0.5}, "return_ratio: expected"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankAdaptation(**settings)


def test_a_sample_gate_below_the_geometrys_is_refused(geometry: RankSpaceGeometry) -> None:
    with pytest.raises(ValueError, match=r"min_samples: expected at least 10 tokens, .* got 5.*kfac_min_samples"):
        RankAdaptation(min_samples=5).validate(geometry)
