"""Measuring in the middle of training without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from grit_lightning.checkpoints.random_state import random_state, restore_random_state


@contextmanager
def evaluating_without_trace(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluate a module without gradients, and afterwards restore the modes of its parts and all random numbers.

    Args:
        module: The module.
        device: Device whose random numbers are kept, besides those of the CPU.
    """
    modes = {part: part.training for part in module.modules()}
    state = random_state(device)
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training  # one by one: some may have been in evaluation mode during training
        restore_random_state(state, device)


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Switch the adapter off for a while, without changing which parameters are trained.

    PEFT alone would afterwards make all parameters of the active adapter trainable, including those that were frozen.
    """
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
