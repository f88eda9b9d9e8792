"""Measuring leaves no trace in modes, random numbers, gradients and what is trained."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model

from grit_lightning.forgetting.without_trace import adapter_off, evaluating_without_trace

CPU = torch.device("cpu")


def make_model(make_tiny_llama: Callable[..., Any], lora_config: Callable[..., Any]) -> PeftModel:
    model = get_peft_model(make_tiny_llama(), lora_config(lora_dropout=0.5)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def test_random_numbers_modes_and_gradients_are_as_before(
    make_tiny_llama: Callable[..., Any], lora_config: Callable[..., Any]
) -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), np.random.rand(), random.random()

    model = make_model(make_tiny_llama, lora_config)
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    frozen = model.base_model.model.model.layers[0].eval()  # in evaluation mode during training
    modes = {name: module.training for name, module in model.named_modules()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = draw()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    with evaluating_without_trace(model, CPU):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        draw()
    assert draw() == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not frozen.training
    assert torch.is_grad_enabled()
    now = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert now.keys() == gradients.keys()
    assert all(torch.equal(now[name], gradients[name]) for name in now)


def test_without_its_adapter_the_model_is_the_backbone_and_trains_the_same_afterwards(
    make_tiny_llama: Callable[..., Any], lora_config: Callable[..., Any]
) -> None:
    model = make_model(make_tiny_llama, lora_config).eval()
    backbone = make_tiny_llama().eval()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)  # PEFT would make it trainable again
    trained = [parameter.requires_grad for parameter in model.parameters()]
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        on = model(tokens).logits
        with adapter_off(model):
            assert torch.equal(model(tokens).logits, backbone(tokens).logits)
        assert torch.equal(model(tokens).logits, on)
        assert not torch.equal(on, backbone(tokens).logits)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert any(trained)
