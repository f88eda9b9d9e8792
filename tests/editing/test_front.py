"""The front is measured, found with few evaluations, and keeps to what was asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel

from grit_lightning import functional as F
from grit_lightning.editing import METHODS, AdapterStatistics, Front, HeldOut, Target, measure_statistics
from grit_lightning.editing.adapter import EditableAdapter
from grit_lightning.editing.front import bisect_log
from grit_lightning.editing.measuring import Measurer
from grit_lightning.editing.methods import first_order, maps_of, second_order

Rows = Callable[[int, int], Any]


@pytest.fixture
def statistics(adapted: PeftModel, task_rows: Rows, general_rows: Rows) -> tuple[AdapterStatistics, AdapterStatistics]:
    return measure_statistics(adapted, task_rows(24, 2)), measure_statistics(adapted, general_rows(24, 1))


@pytest.fixture
def front(adapted: PeftModel, statistics: Any, task_rows: Rows, general_rows: Rows) -> Front:
    sets = [HeldOut("task", task_rows(16, 7), "task"), HeldOut("general", general_rows(16, 8), "general")]
    return Front(EditableAdapter(adapted), *statistics, Measurer(adapted, sets))


def loss(model: PeftModel, rows: Any) -> float:
    """Mean over predicted tokens, one row at a time."""
    total = tokens = 0.0
    for row in rows:
        ids, (start, end) = torch.tensor([row["input_ids"]]), row["learnt"]
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0].log_softmax(-1)
        total -= sum(float(scores[t - 1, ids[0, t]]) for t in range(max(start, 1), end))
        tokens += end - max(start, 1)
    return total / tokens


def test_the_two_ends_are_the_adapter_and_the_backbone(
    front: Front, adapted: PeftModel, task_rows: Rows, general_rows: Rows
) -> None:
    unedited, backbone = front.points
    assert unedited.task.value == pytest.approx(loss(adapted, task_rows(16, 7)), rel=1e-5)
    assert unedited.general.value == pytest.approx(loss(adapted, general_rows(16, 8)), rel=1e-5)
    with adapted.disable_adapter():
        assert backbone.general.value == pytest.approx(loss(adapted, general_rows(16, 8)), rel=1e-5)
    assert backbone.general.change == 0.0
    assert unedited.task.change == 0.0
    assert unedited.general.change == pytest.approx(unedited.general.value - backbone.general.value)
    assert unedited.general.change > 0.5, "this adapter has something to undo"


def test_retention_undoes_more_than_scaling_at_the_same_price(front: Front) -> None:
    target = Target("task_tolerance", 0.02)
    ours, scaled = (front.search(method, target) for method in ("retention", "scaling"))
    assert ours is not None
    assert scaled is not None
    assert ours.task.change <= 0.02
    assert scaled.task.change <= 0.02
    assert ours.general.change < scaled.general.change < front.points[0].general.change


def test_the_search_keeps_to_a_bound_on_forgetting(front: Front) -> None:
    bound = 0.5 * front.points[0].general.change
    point = front.search("retention", Target("forgetting", bound))
    assert point is not None
    assert point.general.change <= bound
    weaker = front.at("retention", point.mu / 2)
    assert weaker.general.change > bound, "a weaker edit would not have done"


def test_a_bound_that_nothing_keeps_gives_nothing(front: Front) -> None:
    assert front.search("retention", Target("forgetting", -100.0), evaluations=3) is None


def test_a_strength_is_measured_once(front: Front) -> None:
    count = len(front.points)
    first = front.at("retention", 0.3)
    assert front.at("retention", 0.3) is first
    assert len(front.points) == count + 1
    assert front.at("retention", 0.0) is front.points[0]


def test_the_model_is_as_it_was_after_a_search(front: Front, adapted: PeftModel, general_rows: Rows) -> None:
    before = loss(adapted, general_rows(16, 8))
    front.search("retention", Target("mu", 0.3))
    assert loss(adapted, general_rows(16, 8)) == before


def test_a_metric_steers_in_place_of_the_loss(
    adapted: PeftModel, statistics: Any, task_rows: Rows, general_rows: Rows
) -> None:
    """The metric here is what is left of the adapter, row for row alike, so that the bound can be checked by hand."""
    weight = next(p for name, p in adapted.named_parameters() if "lora_B" in name)
    start = float(weight.norm())
    sets = [HeldOut("task", task_rows(6, 7), "task"), HeldOut("general", general_rows(6, 8), "general")]
    measurer = Measurer(adapted, sets, metric=lambda model: torch.full((6,), float(weight.norm()) / start))
    point = Front(EditableAdapter(adapted), *statistics, measurer).search("scaling", Target("task_tolerance", 0.25))
    assert point is not None
    assert point.metric is not None
    assert point.metric.change == pytest.approx(1 / (1 + point.mu) - 1, abs=1e-5)
    assert 0.2 < -point.metric.change <= 0.25


def test_general_sources_count_by_weight(adapted: PeftModel, task_rows: Rows, general_rows: Rows) -> None:
    sets = [
        HeldOut("task", task_rows(4, 7), "task"),
        HeldOut("few", general_rows(3, 8), "general", weight=3.0),
        HeldOut("many", task_rows(20, 9), "general", weight=1.0),
        HeldOut("other", task_rows(2, 11), "beside"),
    ]
    measurer = Measurer(adapted, sets)
    measured = measurer.measure("now")
    few, many = (measurer.one(held_out, measured, measured).value for held_out in sets[1:3])
    assert measurer.general(measured, measured).value == pytest.approx(0.75 * few + 0.25 * many)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_at_the_adapter_and_is_finite(statistics: Any, method: str) -> None:
    near = maps_of(method, *statistics, 1e-15, 1e-4)
    for x in near.values():
        torch.testing.assert_close(x, torch.eye(4), atol=1e-3, rtol=0)
    for mu in (0.1, 10.0, 1e6):
        assert all(bool(x.isfinite().all()) for x in maps_of(method, *statistics, mu, 1e-4).values())
    assert maps_of(method, *statistics, 0.0, 1e-4) == {}


def test_predictions_are_the_formulas(statistics: Any) -> None:
    task, general = statistics
    maps = maps_of("retention", task, general, 0.3, 0.0)
    group, other = task.groups[0], general.groups[0]
    x = torch.stack([maps[name] for name in group.names]).double()
    basis = F.retention_basis(group.a_cov, group.g_cov, other.a_cov, other.g_cov, 0.0)
    assert second_order(task, maps) == pytest.approx(
        float(basis.task_cost(0.3).sum()) * task.tokens / task.predicted, rel=1e-3
    )
    assert second_order(general, maps, from_backbone=True) == pytest.approx(
        float(basis.general_cost(0.3).sum()) * general.tokens / general.predicted, rel=1e-3
    )
    assert first_order(general, maps) == pytest.approx(
        float(((x - torch.eye(4)) * other.cross).sum()) * general.tokens / general.predicted, rel=1e-4
    )
    assert first_order(general, {}) == second_order(task, {}) == 0.0


def test_bisection_takes_few_looks() -> None:
    looks: list[float] = []

    def holds(x: float) -> bool:
        looks.append(x)
        return x <= 0.42

    found = bisect_log(holds, 0.1, 8)
    assert found is not None
    assert found <= 0.42 < 1.16 * found
    assert len(looks) <= 8
    assert len(set(looks)) == len(looks)
    assert bisect_log(lambda x: False, 0.1, 5) is None
    assert bisect_log(lambda x: True, 0.1, 5) == pytest.approx(0.1 * 10 ** (0.5 + 1 + 1.5 + 2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of task_tolerance, forgetting, mu, got none"),
        ({"mu": 0.1, "forgetting": 0.0}, "got forgetting, mu"),
        ({"task_tolerance": -0.1}, "task_tolerance.*≥ 0"),
        ({"mu": math.nan}, "mu"),
        ({"forgetting": math.inf}, "forgetting.*finite"),
    ],
)
def test_a_target_is_one_and_makes_sense(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target.one_of(**{"task_tolerance": None, "forgetting": None, "mu": None, **values})


def test_every_set_is_compared_with_its_own_reference(front: Front) -> None:
    unedited, backbone = front.points
    assert unedited.beside["task"].change == backbone.beside["general"].change == 0.0
    assert backbone.beside["task"].change == pytest.approx(backbone.task.change)
    assert unedited.beside["general"].change == pytest.approx(unedited.general.change)
