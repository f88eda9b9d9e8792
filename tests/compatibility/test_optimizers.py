"""Optimizers of torch, bitsandbytes, transformers and others, and ours: trained, saved, resumed bit for bit."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from torch import Tensor
from torch.optim import Optimizer

from .conftest import Compare
from .running import Case, loader

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


def _case(name: str, path: str, settings: dict[str, Any]) -> Case:
    return Case(
        name,
        model={"optimizer": _factory(path, settings)},
        trainer=lambda: {"max_steps": -1, "max_epochs": 2},
        loader=lambda: loader(2),
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
