"""A 4-bit backbone trains after an evaluation as before it, on processors for which bitsandbytes packs weights anew too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grit_lightning.backbones.adapters import attach_adapter
from grit_lightning.backbones.loading import load_backbone


def test_evaluating_a_4_bit_backbone_changes_no_gradient(
    tiny_backbone_dir: Path, lora_config: Any, random_batch: Any
) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = attach_adapter(load_backbone(tiny_backbone_dir, dtype="float32", quantization="nf4"), lora_config())

    def codes() -> list[torch.Tensor]:  # as bytes: what they are stored in is float32 by name only
        layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
        return [layer.weight.data.view(torch.uint8).clone() for layer in layers]

    stored = codes()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape)  # B is zero at first, and A has no gradient then

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**random_batch()).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    assert len(before) == 8  # A and B of two projections in two blocks
    with torch.no_grad():
        model.eval()(**random_batch())
    model.train()
    after = gradients()
    assert after.keys() == before.keys()
    assert all(torch.equal(gradient, after[name]) for name, gradient in before.items())
    assert all(torch.equal(one, other) for one, other in zip(stored, codes(), strict=True))
