"""Checks that a checkpoint belongs to this backbone and this adapter configuration, before anything is loaded from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grit_lightning.errors import InvalidValueError

ARCHITECTURE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "tie_word_embeddings"),
)
SAMPLED_WEIGHTS = 16
VALUES_OF_EACH = 8
BFLOAT16_STEP = 2.0**-7
# PEFT's bookkeeping, not settings of an adapter.
NOT_COMPARED = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "loftq_config",
        "peft_version",
        "revision",
        "task_type",
    )
)


def backbone_fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Describe a backbone by its architecture and a few of its weights, in microseconds.

    Args:
        model: The frozen backbone, before or after its adapter is attached.

    Returns:
        `architecture`: settings by name; `dtype`; `weights`: by name, 8 values float32 `[8]` of each of 16 dense tensors
        spread over the model. Packed (quantised) tensors are skipped.
    """
    config = model.config.get_text_config()
    dense = [
        (name, parameter.detach())
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and type(parameter) is nn.Parameter and "lora_" not in name
    ]
    chosen = [
        dense[i]
        for i in torch.linspace(0, len(dense) - 1, min(SAMPLED_WEIGHTS, len(dense)), device="cpu").long().tolist()
    ]
    return {
        "architecture": {name: getattr(config, name) for name in ARCHITECTURE if hasattr(config, name)},
        "dtype": str(model.dtype),
        "weights": {name: _sample(tensor) for name, tensor in chosen},
    }


def _sample(tensor: Tensor) -> Tensor:
    if tensor.is_meta:  # rank zero has the values
        return torch.zeros(VALUES_OF_EACH, device="cpu")
    places = torch.linspace(0, tensor.numel() - 1, VALUES_OF_EACH, dtype=torch.float64, device="cpu").long()
    return tensor.flatten()[places.to(tensor.device)].float().cpu()


def require_backbone(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Check that two fingerprints describe the same backbone; its dtype and packing may differ.

    Raises:
        ValueError: If they do not; says what differs.
    """
    different = _differences(saved["architecture"], here["architecture"])
    if different:
        raise InvalidValueError(
            f"Checkpoint: expected one trained on this backbone, got one trained on another backbone: {different}. Set "
            "model.backbone to that one."
        )
    exact = saved["dtype"] == here["dtype"]
    changed = [
        name
        for name, values in saved["weights"].items()
        if name in here["weights"] and not _same_weights(values, here["weights"][name], exact)
    ]
    if changed:
        raise InvalidValueError(
            "Checkpoint: expected one trained on this backbone, got one trained on a backbone of this shape with other "
            f"weights: {len(changed)} of {len(saved['weights'])} sampled tensors differ, first {changed[0]}. Set "
            "model.backbone to that one."
        )


def _same_weights(one: Tensor, other: Tensor, exact: bool) -> bool:
    if exact:
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=BFLOAT16_STEP, atol=BFLOAT16_STEP * float(other.abs().max()))


def require_adapter(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Check that two adapter configurations, as PEFT's `to_dict` in plain values, describe the same adapter.

    Raises:
        ValueError: If they do not; names the settings that differ.
    """
    if different := _differences(saved, here):
        raise InvalidValueError(
            f"Checkpoint: expected the adapter configuration of this model, got another adapter configuration: {different}. "
            "Set model.adapter to what the checkpoint was trained with."
        )


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """List settings whose values differ, as `name saved → here`; only those known to both, as PEFT keeps adding some."""
    return ", ".join(
        f"{name} {saved[name]} → {here[name]}"
        for name in saved
        if name in here and name not in NOT_COMPARED and saved[name] != here[name]
    )
