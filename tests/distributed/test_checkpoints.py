"""Checkpoints hold what all processes have, and go on under any strategy on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from grit_lightning.export.adapter import export_adapter

Found = Callable[..., Any]
ROUNDING = 1e-4
KINDS = ("ddp", "fsdp", "fsdp2")


def load(path: Path | str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def test_a_checkpoint_inside_a_window_holds_the_sums_of_all_processes(
    found: Found, results: Path, worker: ModuleType
) -> None:
    """With refreshes far apart and an open window, every statistic is another one on either process."""
    alone, together = worker.window("one", results / "backbone"), found("window", 0)
    for one, two in zip(alone["geometry"]["groups"], together["geometry"]["groups"], strict=True):
        for part in ("total", "window"):
            assert all(bool(expected.any()) for expected in one["statistics"]["window"])
            for expected, value in zip(one["statistics"][part], two["statistics"][part], strict=True):
                assert worker.runs.largest_difference(expected, value) < ROUNDING, part
        for name in ("tokens", "rejected", "capture_counts"):
            assert torch.equal(one["counts"][name], two["counts"][name]), name
    expected, gradients = alone["window"]["gradients"], together["window"]["gradients"]
    assert worker.runs.largest_difference(expected, gradients) < ROUNDING
    other = found("window", 1)["window"]["gradients"]
    assert all(torch.equal(value, other[name]) for name, value in gradients.items())


@pytest.fixture(scope="module")
def uninterrupted(results: Path, worker: ModuleType) -> dict[str, Any]:
    return load(worker.saved_and_resumed("one", results / "backbone", results / "alone", 3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_from_one_process_to_two_and_back(
    kind: str, found: Found, results: Path, worker: ModuleType, uninterrupted: dict[str, Any]
) -> None:
    two = Path(found(f"resumed-{kind}"))
    assert [path.name for path in two.parent.iterdir() if path.is_dir()] == []  # one file, no shards
    end = load(worker.saved_and_resumed("one", results / "backbone", results / f"{kind}-3", 3, resume=two))
    assert load(two)["global_step"] == 6
    assert end["global_step"] == uninterrupted["global_step"] == 9
    assert end["grit"]["ranks"] == uninterrupted["grit"]["ranks"]
    assert worker.runs.largest_difference(uninterrupted["state_dict"], end["state_dict"]) < ROUNDING
    for one, other in zip(uninterrupted["grit"]["geometry"]["groups"], end["grit"]["geometry"]["groups"], strict=True):
        assert torch.equal(one["counts"]["tokens"], other["counts"]["tokens"])
        for part, value in zip(one["statistics"]["total"], other["statistics"]["total"], strict=True):
            assert worker.runs.largest_difference(part, value) < ROUNDING


def test_a_run_stopped_and_resumed_on_two_processes_is_the_one_that_was_not(found: Found) -> None:
    """To the bit, although one is under DDP and the other under FSDP."""
    whole, resumed = (load(found(name)) for name in ("whole", "begun"))
    assert whole["global_step"] == resumed["global_step"] == 9
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_two_processes_is_exported(kind: str, found: Found, results: Path, tmp_path: Path) -> None:
    checkpoint = Path(found(f"resumed-{kind}"))
    adapter = export_adapter(checkpoint, tmp_path / "adapter")
    ranks = load(checkpoint)["grit"]["ranks"]
    assert sorted(adapter.ranks.values()) == sorted(ranks.values())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(results / "backbone"), tmp_path / "adapter")
    assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_hold_no_backbone_under_any_strategy(kind: str, found: Found) -> None:
    held = load(found(f"resumed-{kind}"))["state_dict"]
    assert held.keys() == load(found("one-1"))["state_dict"].keys()
    assert all("lora_" in name and value.ndim == 2 for name, value in held.items())


@pytest.mark.parametrize("shape", [(-1,), (0, 8)])
def test_a_shard_in_place_of_a_factor_is_refused_at_save(
    shape: tuple[int, ...], results: Path, worker: ModuleType
) -> None:
    module = worker.runs.make_module(results / "backbone", worker.OFTEN)
    module.configure_model()
    weight = next(iter(module.geometry)).group.sites[0].down.weight
    weight.data = weight.data.reshape(-1) if shape == (-1,) else weight.data[:0]
    with pytest.raises(ValueError, match=r"keeps the adapter whole, got a shard of .*lora_A.* shape .*grit_fsdp"):
        module.state_dict()
