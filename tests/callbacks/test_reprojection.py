"""When a reprojection happens: the triggers on covariances that drift in known ways, their record, and exact resume.

Proven here: the mass ratio fires once per excursion and rearms inside its band; the angle drift is measured from the last
event, and a change of coordinates by someone else is none; layers without samples or at full rank have no say; the state of
both survives a checkpoint; events are written and their rate is logged; wrong settings are named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from grit_lightning import RankSpaceGeometry
from grit_lightning import functional as F
from grit_lightning.callbacks import RankAdaptation, Reprojection
from grit_lightning.runs.metrics_log import JSONLinesLogger

Factory = Callable[..., Any]


def turned(angle: float) -> Tensor:
    """Σ_a with eigenvalues 8, 4, 2, 1 whose second and third eigenvectors are turned by `angle` into each other."""
    q = torch.eye(4)
    q[1:3, 1:3] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return q @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])) @ q.mT


def with_mass(ratio: float) -> Tensor:
    """Σ_a whose first two eigenvalues hold this share."""
    return torch.diag(torch.tensor([ratio / 2, ratio / 2, (1 - ratio) / 2, (1 - ratio) / 2]))


def test_the_mass_ratio_fires_on_leaving_the_band_and_rearms_inside(
    geometry: RankSpaceGeometry, observe: Factory
) -> None:
    callback = Reprojection(k=2, trigger="mass_ratio", mass_low=0.7, mass_high=0.9)
    found = []
    for ratio in (0.8, 0.95, 0.97, 0.92, 0.85, 0.75, 0.65, 0.6, 0.95, 0.8, 0.65):
        observe(geometry, with_mass(ratio))
        found.append(callback.due(geometry))
    assert [reason is not None for reason in found] == [
        *(False, True, False, False),  # out above once, and silent while it stays there
        *(False, False, True, False, False),  # back in, out below; from below to above without being inside is silent
        *(False, True),
    ]
    assert found[1] == "mass ratio 0.950 outside [0.7, 0.9]"


def test_the_angle_drift_is_measured_from_the_last_event(geometry: RankSpaceGeometry, observe: Factory) -> None:
    callback = Reprojection("one_sided", k=2, trigger="angle_drift", max_drift=math.sin(0.3), blend=0.5)
    observe(geometry, turned(0.1))
    assert callback.due(geometry) is None  # the reference
    observe(geometry, turned(0.35))
    assert callback.due(geometry) is None  # turned by 0.25
    observe(geometry, turned(0.45))
    assert callback.due(geometry) == f"angle drift {math.sin(0.35):.3f} > max_drift {math.sin(0.3):g}"
    callback.reproject(geometry)  # new coordinates, in which the top space is that of the first two axes
    assert callback.due(geometry) is None
    group = geometry.groups[0]
    group.statistics.total.a = F.carry_covariances(
        group.statistics.total.a, group.statistics.total.g, F.ReprojectionMaps(*[_rotation(0.29)] * 2)
    )[0]
    assert callback.due(geometry) is None
    group.statistics.total.a = F.carry_covariances(
        group.statistics.total.a, group.statistics.total.g, F.ReprojectionMaps(*[_rotation(0.05)] * 2)
    )[0]
    assert callback.due(geometry) is not None


def _rotation(angle: float) -> Tensor:
    q = torch.eye(4)
    q[1:3, 1:3] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return q.expand(4, 4, 4)


@pytest.mark.parametrize("mode", ["one_sided", "balanced"])
def test_a_change_of_coordinates_by_someone_else_is_no_drift(
    geometry: RankSpaceGeometry, mode: Any, observe: Factory
) -> None:
    callback = Reprojection(k=2, trigger="angle_drift", max_drift=0.05)
    observe(geometry, turned(0.6))
    assert callback.due(geometry) is None
    rule = {"one_sided": "energy", "balanced": "balanced"}[mode]
    RankAdaptation(rule, 0.9, 2).adapt(geometry, 1)
    assert geometry.mean_rank < 4
    assert not torch.allclose(geometry.groups[0].a_cov[0], turned(0.6), atol=0.1)
    assert callback.due(geometry) is None


@pytest.mark.parametrize("trigger", ["period", "mass_ratio", "angle_drift"])
def test_nothing_is_due_before_there_are_samples(geometry: RankSpaceGeometry, trigger: Any, observe: Factory) -> None:
    callback = Reprojection(k=2, trigger=trigger, max_drift=0.0)
    observe(geometry, with_mass(0.5), tokens=5)
    assert callback.due(geometry) is None
    observe(geometry, with_mass(0.4), tokens=5)
    first = callback.due(geometry)
    assert (first is not None) == (trigger != "angle_drift")  # which takes its reference now, and no earlier


def test_layers_at_full_rank_have_no_say(geometry: RankSpaceGeometry, observe: Factory) -> None:
    observe(geometry, turned(0.1))
    for trigger in ("mass_ratio", "angle_drift"):
        assert Reprojection(trigger=trigger, max_drift=0.0).due(geometry) is None


def test_the_triggers_state_survives(
    geometry: RankSpaceGeometry, make_tiny_llama: Factory, lora_config: Factory, observe: Factory
) -> None:
    fired, drifting = (Reprojection(k=2, trigger=t, max_drift=0.2) for t in ("mass_ratio", "angle_drift"))
    observe(geometry, turned(0.1))
    assert drifting.due(geometry) is None
    observe(geometry, with_mass(0.5))
    assert fired.due(geometry)
    twin = RankSpaceGeometry(get_peft_model(make_tiny_llama(), lora_config()), geometry.config)
    twin.load_state_dict(geometry.state_dict())
    for callback in (fired, drifting):
        resumed = Reprojection(k=2, trigger=callback.trigger, max_drift=0.2)
        resumed.load_state_dict(callback.state_dict())
        observe(geometry, turned(0.5))
        observe(twin, turned(0.5))
        assert resumed.due(twin) == callback.due(geometry)
    assert Reprojection(k=2, trigger="mass_ratio").due(twin) is None  # 12/15 is inside; a fresh one is armed
    observe(twin, with_mass(0.5))
    assert Reprojection(k=2, trigger="mass_ratio").due(twin) is not None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [2, 4, 6, 8]),
        ({"trigger": "mass_ratio", "mass_low": 0.0, "mass_high": 0.01}, [2]),
        ({"trigger": "angle_drift", "max_drift": 0.0}, [4, 6, 8]),
        ({"trigger": "angle_drift", "max_drift": 0.999999}, []),
    ],
)
def test_events_are_written_and_their_rate_is_logged(
    make_module: Factory,
    make_trainer: Factory,
    loader: Factory,
    tmp_path: Path,
    settings: dict[str, Any],
    expected: list[int],
) -> None:
    callback = Reprojection(every_n_steps=2, k=2, **settings)
    module = make_module()
    trainer = make_trainer(callbacks=[callback], logger=JSONLinesLogger(tmp_path))
    trainer.fit(module, loader(8), loader(1))
    assert [event.step for event in callback.events] == expected
    assert module.geometry.reprojection_count == len(expected)
    assert callback.events_per_1000_steps == 1000 * len(expected) / 8
    assert trainer.callback_metrics["grit/reprojections_per_1000_steps"] == callback.events_per_1000_steps
    path = tmp_path / "reprojections.jsonl"
    written = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert written == [event._asdict() for event in callback.events]
    assert all(event["reason"] for event in written)


def test_a_run_without_loggers_writes_nothing(
    make_module: Factory, make_trainer: Factory, loader: Factory, tmp_path: Path
) -> None:
    callbacks = [Reprojection(every_n_steps=1), RankAdaptation(every_n_steps=1, min_rank=1)]
    make_trainer(callbacks=callbacks).fit(make_module(), loader(3), loader(1))
    assert callbacks[0].events  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trigger": "sometimes"}, "trigger: expected period, mass_ratio or angle_drift"),
        ({"mass_low": 0.9, "mass_high": 0.8}, r"0 ≤ low < high ≤ 1, got \(0.9, 0.8\)"),
        ({"max_drift": 1.0}, r"max_drift .*: expected a number in \[0, 1\)"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reprojection(**settings)
