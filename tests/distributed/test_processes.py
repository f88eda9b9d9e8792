"""Two real processes train the model that one process trains, under every strategy."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from grit_lightning.checkpoints.reading import read_checkpoint

KINDS = ("ddp", "fsdp", "fsdp2")
SHARDED = ("fsdp", "fsdp2")
VARIANTS = ("tied", "nf4, recomputed", "bf16-mixed, offloaded", "each reads")
ROUNDING = 1e-4  # relative to the largest entry; ten steps of AdamW amplify the 1e-7 of another order of summation
Found = Callable[..., Any]


@pytest.fixture(scope="module")
def one(worker: ModuleType, results: Path) -> dict[str, Any]:
    run: dict[str, Any] = worker.runs.train("one", results / "backbone")
    return run


@pytest.fixture(scope="module")
def alone(worker: ModuleType, results: Path) -> Callable[[str], dict[str, Any]]:
    """Runs a variant on a single process, once for all strategies."""
    return functools.cache(lambda name: worker.variant(name, "one", results))


@pytest.fixture(scope="module")
def retained_alone(worker: ModuleType, results: Path) -> Callable[[str], dict[str, Any]]:
    """Retains on a single process, once for all strategies."""
    return functools.cache(lambda mode: worker.retained("one", results / "backbone", mode))


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


def test_two_processes_train_a_module_of_somebody_else(found: Found, worker: ModuleType, results: Path) -> None:
    one, *two = worker.own("one", results / "backbone"), found("own-ddp", 0), found("own-ddp", 1)
    assert min(one["ranks"].values()) < 8
    for part in ("Σ_a", "Σ_g", "weights"):
        assert worker.runs.largest_difference(one[part], two[0][part]) < ROUNDING, part
        assert worker.runs.largest_difference(two[0][part], two[1][part]) == 0.0, part
    assert one["ranks"] == two[0]["ranks"] == two[1]["ranks"]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("ddp", "at_end"), ("ddp", "penalty"), ("fsdp", "periodic"), ("fsdp", "measured"), ("fsdp2", "penalty")],
)
def test_two_processes_retain_what_one_does(
    kind: str, mode: str, retained_alone: Callable[[str], Any], found: Found, worker: ModuleType
) -> None:
    one, both = retained_alone(mode), [found(f"retained {mode}-{kind}", rank) for rank in range(2)]
    assert worker.runs.replicas_agree(*both)
    for part in ("weights", "Σ_a", "Σ_g"):
        assert worker.runs.largest_difference(one[part], both[0][part]) < ROUNDING, part
    for part in ("tokens", "task tokens", "mu"):
        assert one[part] == both[0][part], part
    assert one["mu"] > 0


@pytest.mark.parametrize("kind", SHARDED)
def test_a_module_of_somebody_else_is_not_sharded(kind: str, found: Found) -> None:
    assert found(f"own-{kind}")["refused"].startswith(
        "trainer.strategy: expected ddp or one device for a module of your own"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_are_equal_to_the_bit(kind: str, found: Found, worker: ModuleType) -> None:
    assert worker.runs.replicas_agree(found(f"train-{kind}", 0), found(f"train-{kind}", 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_geometry_adds_two_collectives_a_refresh(kind: str, found: Found) -> None:
    """One for values and one for counts."""
    counted = found(f"count-{kind}")
    plain, geometry = counted["plain"], counted["geometry"]
    refreshes = counted["steps"] // 3
    calls = {name: geometry["calls"][name] - plain["calls"].get(name, 0) for name in geometry["calls"]}
    added = sum(geometry["bytes"].values()) - sum(plain["bytes"].values())
    assert {name: number for name, number in calls.items() if number} == {"allreduce": 2 * refreshes}
    floats, counts = (
        counted["floats_of_statistics"] + counted["layers"],
        3 * counted["layers"],
    )  # each layer has a weight
    assert added == refreshes * (4 * floats + 8 * counts)


@pytest.mark.parametrize("kind", SHARDED)
def test_processes_stay_in_step_when_one_has_generated_its_answer(kind: str, found: Found) -> None:
    for rank in range(2):
        assert found(f"generated-{kind}", rank) == found("generated-ddp", rank)
    lengths = [[len(text.split()) for text, _ in found(f"generated-{kind}", rank)] for rank in range(2)]
    assert lengths == [[6, 1, 6, 1], [6, 6, 6, 6]]


@pytest.mark.parametrize("kind", SHARDED)
def test_only_rank_zero_reads_a_dense_backbone(kind: str, found: Found) -> None:
    reads = {name: [found(f"{name}-{kind}", rank)["read"] for rank in range(2)] for name in VARIANTS}
    assert reads == {
        "tied": [1, 0],
        "bf16-mixed, offloaded": [1, 0],
        "nf4, recomputed": [1, 1],  # its packing is known only when it is read
        "each reads": [1, 1],
    }


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sharded_variants_train_what_one_process_trains(
    variant: str, kind: str, found: Found, alone: Callable[[str], Any], worker: ModuleType
) -> None:
    one, both = alone(variant), [found(f"{variant}-{kind}", rank) for rank in range(2)]
    assert worker.runs.replicas_agree(*both)
    assert both[0]["dtypes"] == ["torch.float32"]
    assert both[0]["tokens"] == one["tokens"]
    tolerance = 0.02 if "bf16" in variant else ROUNDING  # two orders of summation round differently to 8 bits
    for part in ("Σ_a", "Σ_g", "weights"):
        assert worker.runs.largest_difference(one[part], both[0][part]) < tolerance, part
    assert sum(process["held"] for process in both) < 1.1 * one["held"]
    assert max(process["held"] for process in both) < 0.6 * one["held"]


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_called_outside_of_a_step_says_so(variant: str, kind: str, found: Found) -> None:
    assert "expected a call inside a training or evaluation step" in found(f"{variant}-{kind}")["outside"]


def test_what_breaks_on_one_process_stops_all_before_the_weights_change(found: Found) -> None:
    first, second = found("broken", 0), found("broken", 1)
    assert "expected a finite gradient of all processes, got one that is not" in first["said"]
    assert "expected a finite training loss, got [nan" in second["said"]
    assert first["weights"] == second["weights"] == "finite"


def test_sums_averages_copies_and_gathered_objects_are_those_of_both_processes(found: Found) -> None:
    both = [found("collectives", rank) for rank in range(2)]
    for own in both:
        shared, once, never = own["gradients"]
        assert shared.tolist() == [1.5, 1.5]
        assert once.tolist() == [3.0, 3.0, 3.0]  # zero where it took no part, as under DDP
        assert never is None
        assert own["sum"].tolist() == [2.0, 2.0]
        assert own["counts"].tolist() == [2**35 + 3, 8191]  # float32 alone would lose the last digits
        assert own["copied"].tolist() == [7.0, 7.0]
        assert own["gathered"] == [{"rank": 0}, {"rank": 1}]


def test_a_case_that_fails_says_why_and_takes_no_other_along(found: Found) -> None:
    """The harness itself: after a failure on one process, and one on both, the next case runs as if alone."""
    for name, rank, reason in (
        ("fails on one", 1, "process 1 has failed"),
        ("fails on one", 0, "Connection closed|timed out|Timed out|reset"),
        ("fails on both", 0, "process 0 has failed"),
        ("fails on both", 1, "process 1 has failed"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            found(name, rank)
    with pytest.raises(RuntimeError, match="'never heard of' has left no result on process 0"):
        found("never heard of")
    assert found("collectives", 0)["counts"].tolist() == found("collectives", 1)["counts"].tolist()


def test_a_signal_to_one_process_stops_all_after_the_same_step(found: Found, results: Path) -> None:
    stops = [found("asked to stop", rank) for rank in (0, 1)]
    assert [(stop["code"], stop["step"]) for stop in stops] == [(143, 2), (143, 2)]
    assert all(stop["handler"] == str(signal.SIG_DFL) for stop in stops), "signals are given back"
    assert read_checkpoint(results / "asked" / "last.ckpt")["global_step"] == 2
