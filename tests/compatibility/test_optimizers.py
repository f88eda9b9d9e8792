"""Optimizers of torch, bitsandbytes, transformers and others, and ours: trained, saved, resumed bit for bit."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import Optimizer

from grit_lightning.callbacks import Reprojection
from grit_lightning.geometry.moments import ChangesCoordinates

from .cases import Case, loader
from .conftest import Compare
from .watching import Run, require

EIGHT_BIT = {"min_8bit_size": 16}  # bitsandbytes keeps the moments of smaller tensors in float32
RATE = {"lr": 1e-2}

# Class → settings besides the learning rate.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "grit_lightning.optimizers:EigenbasisAdam": {},
    "grit_lightning.optimizers:NaturalAdam": {},
    "torch.optim:AdamW": {},
    "torch.optim:Adam": {"amsgrad": True},
    "torch.optim:NAdam": {},
    "torch.optim:RAdam": {},
    "torch.optim:Adamax": {},
    "torch.optim:Adagrad": {},
    "torch.optim:Adadelta": {"lr": 1.0},
    "torch.optim:Adafactor": {},
    "torch.optim:ASGD": {},
    "torch.optim:LBFGS": {"max_iter": 2},
    "torch.optim:Muon": {},
    "torch.optim:RMSprop": {},
    "torch.optim:Rprop": {},
    "torch.optim:SGD": {"momentum": 0.9, "nesterov": True},
    "bitsandbytes.optim:AdamW8bit": EIGHT_BIT,
    "bitsandbytes.optim:PagedAdamW": {},
    "bitsandbytes.optim:PagedAdamW8bit": EIGHT_BIT,
    "bitsandbytes.optim:AdEMAMix8bit": EIGHT_BIT,
    "bitsandbytes.optim:PagedAdEMAMix8bit": EIGHT_BIT,
    "bitsandbytes.optim:Lion": {},
    "bitsandbytes.optim:Lion8bit": EIGHT_BIT,
    "bitsandbytes.optim:PagedLion8bit": EIGHT_BIT,
    "bitsandbytes.optim:LAMB8bit": EIGHT_BIT,
    "bitsandbytes.optim:SGD8bit": EIGHT_BIT | {"momentum": 0.9},
    "transformers.optimization:Adafactor": {"relative_step": False},
    "lion_pytorch:Lion": {},
    "schedulefree:AdamWScheduleFree": {},
    "schedulefree:SGDScheduleFree": {},
    "prodigyopt:Prodigy": {"lr": 1.0},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch.optim.AdamW, `fused`": ("torch.optim:AdamW", {"fused": True}),
    "torch.optim.AdamW, `foreach`": ("torch.optim:AdamW", {"foreach": True}),
    "torch.optim.AdamW, `maximize`": ("torch.optim:AdamW", {"maximize": True}),
}


def _factory(path: str, settings: dict[str, Any]) -> Callable[[Iterable[Tensor]], Optimizer]:
    def build(parameters: Iterable[Tensor]) -> Optimizer:
        module, _, name = path.partition(":")
        optimizer: Optimizer = getattr(importlib.import_module(module), name)(parameters, **(RATE | settings))
        return optimizer

    return build


def _nothing_more(run: Run) -> None:
    pass


def _keeps_eight_bits(run: Run) -> None:
    """Check that the moments are really packed: bitsandbytes leaves those of small tensors as they are."""
    (optimizer,) = run.module.trainer.optimizers
    kinds = {value.dtype for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)}
    require(torch.uint8 in kinds, f"the state is kept as {kinds}")


def _case(name: str, path: str, settings: dict[str, Any]) -> Case:
    return Case(
        name,
        model={"optimizer": _factory(path, settings)},
        trainer=lambda: {"max_steps": -1, "max_epochs": 2},
        loader=lambda: loader(2),
        check=_keeps_eight_bits if "8bit" in path else _nothing_more,
        resumes=True,
        needs=path,
    )


CASES = [
    *(_case(path.replace(":", "."), path, settings) for path, settings in OPTIMIZERS.items()),
    *(_case(name, path, settings) for name, (path, settings) in VARIANTS.items()),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_optimizer_trains_as_the_page_says(case: Case, compare: Compare) -> None:
    compare("Optimizers", CASES, case)


class _Memory(Callback):
    """Copies the optimizer's state before a reprojection, and looks afterwards for what is still in old coordinates."""

    def __init__(self) -> None:
        self.before: dict[tuple[int, str], Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.before = _state_of(trainer)


def _state_of(trainer: Trainer) -> dict[tuple[int, str], Tensor]:
    (optimizer,) = trainer.optimizers
    return {
        (index, name): value.clone()
        for index, state in enumerate(optimizer.state.values())
        for name, value in state.items()
        if torch.is_tensor(value) and value.numel() > 1 and not name.startswith("qmap")
    }


def _carried(run: Run) -> None:
    """Check that a change of coordinates has reached everything that the optimizer remembers."""
    trainer = run.module.trainer
    geometry = run.module.geometry
    assert geometry is not None
    require(geometry.reprojection_count > 0, "no reprojection")
    before = next(each for each in trainer.callbacks if isinstance(each, _Memory)).before  # type: ignore[attr-defined]
    if isinstance(trainer.optimizers[0], ChangesCoordinates):
        return  # keeps its state in coordinates of its own
    after = _state_of(trainer)
    stale = {name for (index, name), value in after.items() if value.any() and torch.equal(value, before[index, name])}
    require(not stale, f"still in old coordinates: {', '.join(sorted(stale))}")
    for state in trainer.optimizers[0].state.values():
        for name in ("state1", "state2"):
            if name in state and state[name].dtype == torch.uint8 and not state[name].any():
                zero = state["qmap" + name[-1]][0]  # the value that a byte of zero stands for
                require(
                    zero == 0, f"8-bit {name} is set to bytes of 0, which stand for {zero:.1f} of its largest value"
                )


REPROJECTED = [
    replace(
        case,
        trainer=lambda: {"callbacks": [_Memory(), Reprojection(every_n_steps=4)]},
        loader=lambda: loader(4),
        check=_carried,
        resumes=False,
    )
    for case in CASES
    if ", `" not in case.name and ".Paged" not in case.name
]


@pytest.mark.parametrize("case", REPROJECTED, ids=lambda case: case.name)
def test_an_optimizer_is_reprojected_as_the_page_says(case: Case, compare: Compare) -> None:
    compare("Optimizers under reprojection", REPROJECTED, case)
