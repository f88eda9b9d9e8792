"""The parameters in a checkpoint: trained ones only, under plain names, whole, and put back nowhere else.

Also: settings go into a checkpoint as values that no code has to run for.
"""

from __future__ import annotations

import doctest
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from grit_lightning.checkpoints import plain_values
from grit_lightning.checkpoints.adapter_state import adapter_names, load_saved_state, saved_state, trained_parameters
from grit_lightning.checkpoints.plain_values import to_plain_values


class Layer(nn.Module):
    """A frozen layer and a trained factor."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.lora_A = nn.ParameterDict({"default": nn.Parameter(torch.full((2, 3), value))})


NAMES = frozenset({"lora_A.default", "inner.lora_A.default"})


def wrapped(layer: nn.Module) -> nn.Module:
    """The names that compiling and sharding make of it."""
    outer, inner = nn.Module(), nn.Module()
    inner._fsdp_wrapped_module = layer
    outer._orig_mod = inner
    return outer


def test_the_state_is_that_of_a_single_process_whatever_wraps_the_layers() -> None:
    layer = Layer(1.0)
    assert trained_parameters(wrapped(layer)).keys() == trained_parameters(layer).keys() == {"lora_A.default"}
    assert saved_state(layer, NAMES, prefix="x.").keys() == {"x.lora_A.default"}
    assert not saved_state(layer, NAMES)["lora_A.default"].requires_grad
    assert saved_state(layer, NAMES, keep_vars=True)["lora_A.default"] is layer.lora_A["default"]


def test_an_adapter_is_saved_whole_and_a_backbone_only_where_it_is_trained() -> None:
    layer = Layer()
    layer.lora_A["default"].requires_grad_(False)
    layer.frozen.bias.requires_grad_(True)
    layer.register_buffer("made_anew", torch.zeros(1), persistent=False)
    layer.register_buffer("projection", torch.zeros(1))
    assert adapter_names(layer, layer.frozen.parameters()) == {"lora_A.default", "frozen.bias", "projection"}
    assert adapter_names(wrapped(layer), layer.frozen.parameters()) == adapter_names(layer, layer.frozen.parameters())


def test_a_state_is_copied_into_the_parameters_that_are_there() -> None:
    layer = Layer()
    parameter = layer.lora_A["default"]
    load_saved_state(wrapped(layer), NAMES, saved_state(Layer(3.0), NAMES))
    assert layer.lora_A["default"] is parameter
    assert bool((parameter == 3.0).all())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("lora_A.default"),
        lambda state: state.update(more=torch.zeros(1)),
        lambda state: state.update({"lora_A.default": torch.zeros(3, 2)}),
    ],
    ids=["missing", "more", "shape"],
)
def test_parameters_of_another_adapter_are_refused_before_any_is_changed(spoil: Callable[[Any], Any]) -> None:
    layer, state = Layer(), saved_state(Layer(3.0), NAMES)
    spoil(state)
    with pytest.raises(ValueError, match=r"expected the adapter parameters of this model, got others: \d differ"):
        load_saved_state(layer, NAMES, state)
    assert bool((layer.lora_A["default"] == 0.0).all())


@pytest.mark.parametrize("shard", [torch.zeros(6), torch.zeros(0, 3)], ids=["flat", "empty"])
def test_a_shard_in_place_of_a_factor_is_refused(shard: torch.Tensor) -> None:
    layer = nn.ModuleDict({"inner": Layer()})
    layer["inner"].lora_A["default"] = nn.Parameter(shard)
    with pytest.raises(
        ValueError,
        match=r"keeps the adapter whole, got a shard of inner\.lora_A\.default .* ddp, grit_fsdp, grit_fsdp2",
    ):
        saved_state(layer, NAMES)


def test_settings_become_values_that_a_checkpoint_may_hold() -> None:
    class Kind(enum.Enum):
        ONE = "one"

    @dataclass
    class Settings:
        targets: frozenset[str]
        kind: Kind

    plain = to_plain_values({1: Settings(frozenset({"b", "a"}), Kind.ONE), "t": (1, None)})
    assert plain == {"1": {"targets": ["a", "b"], "kind": "one"}, "t": [1, None]}


def test_examples_in_docstrings_hold() -> None:
    result = doctest.testmod(plain_values)
    assert result.attempted > 0
    assert result.failed == 0
