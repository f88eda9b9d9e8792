"""Slicing an adapter: every layer keeps its own rank, and the scaling that it was trained with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from grit_lightning.export.compaction import alpha_for, compact

LoraLayers = Callable[..., dict[str, Any]]


def test_names_that_end_alike_keep_their_own_ranks(lora_layers: LoraLayers) -> None:
    """PEFT matches pattern keys as regular expressions, and the end of a name too: each layer must match only itself."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_q, self.a = nn.Linear(4, 4), nn.ModuleDict({"q": nn.Linear(4, 4)})

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.a_q, self.a = Inner(), nn.Linear(4, 4), nn.ModuleDict({"q": nn.Linear(4, 4)})

    names = ["a.q", "a_q", "inner.a.q", "inner.a_q"]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["a_q", "q"])
    trained = {}
    for rank, name in enumerate(names, start=1):
        b = torch.ones(4, 4)
        b[:, rank:] = 0
        trained[f"base_model.model.{name}.lora_A.weight"] = torch.ones(4, 4)
        trained[f"base_model.model.{name}.lora_B.weight"] = b
    compacted = compact(config, trained)
    rebuilt = lora_layers(PeftModel(Outer(), compacted.config))
    assert {name: layer.r["default"] for name, layer in rebuilt.items()} == dict(zip(names, (1, 2, 3, 4), strict=True))
    assert {layer.scaling["default"] for layer in rebuilt.values()} == {1.0}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_alpha_gives_back_the_scaling(use_rslora: bool) -> None:
    for r in range(1, 40):
        for alpha in (1, 8, 16, 0.3):
            scaling = alpha / (math.sqrt(r) if use_rslora else r)
            for k in range(1, r + 1):
                found = alpha_for(scaling, k, use_rslora) / (math.sqrt(k) if use_rslora else k)
                assert found == pytest.approx(scaling, rel=4e-16), "one unit in the last place of a double"
                assert torch.tensor(found) == torch.tensor(scaling), "the same float32"
