"""Two real processes train the model that one process trains, under every strategy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

KINDS = ("ddp", "fsdp", "fsdp2")
SHARDED = ("fsdp", "fsdp2")
ROUNDING = 1e-4  # relative to the largest entry; ten steps of AdamW amplify the 1e-7 of another order of summation
Found = Callable[..., Any]


@pytest.fixture(scope="module")
def one(worker: ModuleType, results: Path) -> dict[str, Any]:
    run: dict[str, Any] = worker.runs.train("one", results / "backbone")
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_the_model_of_one(kind: str, one: dict[str, Any], found: Found, worker: ModuleType) -> None:
    two = found(f"train-{kind}")
    assert one["steps"] == two["steps"] == 10
    assert one["reprojections"] == two["reprojections"] == 2
    assert one["ranks"] == two["ranks"]
    assert min(one["ranks"].values()) < 8
    assert one["tokens"] == two["tokens"]
    for part in ("Σ_a", "Σ_g", "weights", "train/loss", "val/loss"):
        assert worker.runs.largest_difference(one[part], two[part]) < ROUNDING, part
    assert bool(two["val/loss"].isfinite())


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_are_equal_to_the_bit(kind: str, found: Found, worker: ModuleType) -> None:
    assert worker.runs.replicas_agree(found(f"train-{kind}", 0), found(f"train-{kind}", 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_geometry_adds_one_collective_a_refresh(kind: str, found: Found) -> None:
    counted = found(f"count-{kind}")
    plain, geometry = counted["plain"], counted["geometry"]
    refreshes = counted["steps"] // 3
    calls = {name: geometry["calls"][name] - plain["calls"].get(name, 0) for name in geometry["calls"]}
    added = sum(geometry["bytes"].values()) - sum(plain["bytes"].values())
    assert {name: number for name, number in calls.items() if number} == {"allreduce": refreshes}
    counts = counted["layers"] * (1 + 3 * 2)  # a weight, and three counts as two halves each
    assert added == refreshes * 4 * (counted["floats_of_statistics"] + counts)


def test_a_backbone_read_by_one_process_is_the_one_that_each_reads(found: Found) -> None:
    for kind in SHARDED:
        each, tied = found(f"each reads-{kind}"), found(f"tied-{kind}")
        assert each["weights"].keys() == tied["weights"].keys()
    fsdp, fsdp2 = found("each reads-fsdp"), found("each reads-fsdp2")
    for name, value in fsdp["weights"].items():
        torch.testing.assert_close(value, fsdp2["weights"][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("variant", ["tied", "nf4, recomputed", "bf16-mixed, offloaded", "each reads"])
def test_sharded_variants_train_what_one_process_trains(
    variant: str, kind: str, found: Found, results: Path, worker: ModuleType
) -> None:
    _, settings, folder = worker.VARIANTS[variant]
    alone = worker.brief("auto", results / folder, **settings)
    both = [found(f"{variant}-{kind}", rank) for rank in range(2)]
    assert worker.runs.replicas_agree(*both)
    assert both[0]["dtypes"] == ["torch.float32"]
    assert both[0]["tokens"] == alone["tokens"]
    tolerance = 0.02 if "bf16" in variant else ROUNDING  # two orders of summation round differently to 8 bits
    for part in ("Σ_a", "Σ_g", "weights"):
        assert worker.runs.largest_difference(alone[part], both[0][part]) < tolerance, part
    assert sum(process["held"] for process in both) < 1.1 * alone["held"]
    assert max(process["held"] for process in both) < 0.6 * alone["held"]


def test_what_breaks_on_one_process_stops_all_before_the_weights_change(found: Found) -> None:
    first, second = found("broken", 0), found("broken", 1)
    assert "gradient of all processes is not finite" in first["said"]
    assert "training loss is [nan" in second["said"]
    assert first["weights"] == second["weights"] == "finite"
