"""The packer by itself: what it puts into a checkpoint comes back, and nothing is loaded from one that does not fit.

- the geometry at once; random numbers and the open window when the training starts, and only once;
- on another number of processes, Lightning's counts are changed and every process draws its own numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from grit_lightning.accumulation_window import AccumulationWindow
from grit_lightning.checkpoints.packing import CheckpointPacker
from grit_lightning.checkpoints.reading import CHECKPOINT_FORMAT, CHECKPOINT_KEY

CPU = torch.device("cpu")
BACKBONE = {"architecture": {"num_hidden_layers": 2}, "dtype": "torch.float32", "weights": {"w": torch.ones(2)}}
ADAPTER = {"r": 4, "target_modules": ["q_proj"]}


class Geometry:
    """Stands in for the geometry: a state that is loaded or not."""

    ranks: dict[str, int] = {"layer": 3}  # noqa: RUF012

    def __init__(self, state: str) -> None:
        self.state = state

    def state_dict(self) -> dict[str, str]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, str]) -> None:
        self.state = state["state"]


def make_packer(state: str = "new", **changed: Any) -> CheckpointPacker:
    settings: dict[str, Any] = {"backbone": BACKBONE, "adapter": ADAPTER, "start": {}, "geometry": Geometry(state)}
    return CheckpointPacker(**(settings | changed), window=AccumulationWindow())


@pytest.fixture
def trained() -> dict[str, nn.Parameter]:
    return {"factor": nn.Parameter(torch.zeros(2))}


@pytest.fixture
def checkpoint(trained: dict[str, nn.Parameter]) -> dict[str, Any]:
    """A checkpoint in an accumulation window of one micro-batch, with the counts that Lightning keeps."""
    packer, parameters = make_packer("trained"), {"factor": nn.Parameter(torch.zeros(2))}
    packer.window.add_loss(torch.tensor(2.0), torch.tensor(True))
    packer.window.finish_micro_batch()
    parameters["factor"].grad = torch.tensor([1.0, 2.0])
    counts = {"ready": 7, "started": 7, "processed": 6, "completed": 6}
    progress = {"total": dict(counts), "current": dict(counts)}
    saved: dict[str, Any] = {
        "state_dict": {name: p.detach() for name, p in trained.items()},
        "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}},
    }
    torch.manual_seed(5)
    packer.pack(saved, parameters, CPU)
    return saved


def test_an_entry_holds_all_that_the_next_step_depends_on(checkpoint: dict[str, Any]) -> None:
    entry = checkpoint[CHECKPOINT_KEY]
    assert (entry["format_version"], entry["adapter"], entry["ranks"]) == (CHECKPOINT_FORMAT, ADAPTER, {"layer": 3})
    assert entry["geometry"] == {"state": "trained"}
    assert len(entry["random"]) == 1
    assert entry["window"]["micro_batches"] == 1


def test_what_was_packed_comes_back_and_the_window_when_training_starts_and_once(
    checkpoint: dict[str, Any], trained: dict[str, nn.Parameter]
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    packer = make_packer()
    packer.unpack(checkpoint, trained)
    assert packer.geometry.state == "trained"
    assert packer.window.micro_batches == 0
    packer.resume(trained, CPU, rank=0)
    assert torch.equal(torch.rand(3), expected)
    assert packer.window.micro_batches == 1
    assert trained["factor"].grad.tolist() == [1.0, 2.0]
    packer.window.micro_batches = 0
    packer.resume(trained, CPU, rank=0)  # nothing is left to resume
    assert packer.window.micro_batches == 0


@pytest.mark.parametrize(
    ("spoil", "changed", "message"),
    [
        (lambda saved: saved.pop(CHECKPOINT_KEY), {}, "without the entry 'grit'"),
        (lambda saved: saved[CHECKPOINT_KEY].update(format_version=3), {}, "expected format version 4, got 3"),
        (lambda saved: None, {"backbone": {**BACKBONE, "architecture": {"num_hidden_layers": 3}}}, "another backbone"),
        (lambda saved: None, {"backbone": {**BACKBONE, "weights": {"w": torch.zeros(2)}}}, "other weights"),
        (lambda saved: None, {"adapter": {**ADAPTER, "r": 8}}, "another adapter configuration: r 4 → 8"),
        (
            lambda saved: saved["state_dict"].update(factor=torch.zeros(3)),
            {},
            "expected the adapter parameters of this model, got others",
        ),
    ],
    ids=["no entry", "format", "backbone", "weights", "adapter", "shape"],
)
def test_nothing_is_loaded_from_a_checkpoint_that_does_not_fit(
    checkpoint: dict[str, Any],
    trained: dict[str, nn.Parameter],
    spoil: Callable[[Any], Any],
    changed: dict[str, Any],
    message: str,
) -> None:
    spoil(checkpoint)
    packer, before = make_packer(**changed), copy.deepcopy(checkpoint["loops"])
    with pytest.raises(ValueError, match=message):
        packer.unpack(checkpoint, trained)
    packer.resume(trained, CPU, rank=0)
    assert packer.geometry.state == "new"
    assert packer.window.micro_batches == 0
    assert trained["factor"].grad is None
    assert checkpoint["loops"] == before


def test_without_a_geometry_on_either_side_the_rest_is_loaded(
    checkpoint: dict[str, Any], trained: dict[str, nn.Parameter]
) -> None:
    make_packer(geometry=None).unpack(checkpoint, trained)
    checkpoint[CHECKPOINT_KEY]["geometry"] = None
    packer = make_packer()
    packer.unpack(checkpoint, trained)
    assert packer.geometry.state == "new"


def test_another_number_of_processes_counts_its_own_batches_and_draws_its_own_numbers(
    checkpoint: dict[str, Any], trained: dict[str, nn.Parameter]
) -> None:
    checkpoint[CHECKPOINT_KEY]["random"] *= 2  # of two processes, each with seven micro-batches
    packer = make_packer()
    packer.unpack(checkpoint, trained)
    counts = {"ready": 14, "started": 14, "processed": 13, "completed": 13}
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress == {"total": counts, "current": counts}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    packer.resume(trained, CPU, rank=0)
    assert torch.equal(torch.rand(3), expected)
    assert packer.window.micro_batches == 1
