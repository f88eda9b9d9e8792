"""Merge an adapter into its backbone, so that transformers alone computes what the trained model computes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from grit_lightning.backbones.adapters import attach_adapter
from grit_lightning.errors import InvalidValueError
from grit_lightning.export.compaction import CompactAdapter


def merge(backbone: PreTrainedModel, adapter: CompactAdapter) -> PreTrainedModel:
    """Merge with PEFT what PEFT would load from the exported adapter.

    Args:
        backbone: The backbone; it is changed.
        adapter: The adapter.

    Returns:
        The backbone with dense weights, ready to be saved.

    Raises:
        ValueError: If the adapter does not fit the backbone.
    """
    model = attach_adapter(_as_dense(backbone), adapter.config)
    untie(model)
    result = set_peft_model_state_dict(model, adapter.tensors)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise InvalidValueError(
            f"The adapter: expected parameters that fit the backbone, got {[*missing, *result.unexpected_keys][:3]}, which do "
            "not. Merge into the backbone that it was trained on."
        )
    with warnings.catch_warnings():  # PEFT says what `untie` has done
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied", UserWarning)
        merged = _merged(model, adapter)
    merged.config.use_cache = True  # training had switched it off
    return merged


def _merged(model: PeftModel, adapter: CompactAdapter) -> PreTrainedModel:
    try:
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, RuntimeError, ValueError) as error:  # of PEFT, about some of its variants
        raise InvalidValueError(
            "--merge: expected an adapter that PEFT can merge, got one that it cannot: "
            f"{str(error).strip().rstrip('.')}. Export it without --merge."
        ) from error
    return merged


def require_mergeable(config: PeftConfig) -> None:
    """Check that an adapter can become a part of the backbone's weights.

    Raises:
        ValueError: If it cannot.
    """
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type) if config.peft_type else None
    if not hasattr(tuner, "merge_and_unload"):
        raise InvalidValueError(
            "--merge: expected an adapter that can become a part of the weights, got "
            f"{config.peft_type.value if config.peft_type else 'another'}, which cannot. Export it without --merge."
        )


def untie(model: PeftModel) -> None:
    """Give every adapted layer its own weights where it shares them: what is added to them is not for the others.

    Args:
        model: The model; its configuration then says that the embeddings are not tied.
    """
    modules = list(model.modules())
    owners = Counter(id(weight) for module in modules for weight in module.parameters(recurse=False))
    if getattr(model.active_peft_config, "layer_replication", None):
        _unshare_all(model.get_base_model(), owners)
    for layer in modules:
        base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        weight = getattr(base, "weight", None)
        if isinstance(weight, nn.Parameter) and owners[id(weight)] > 1:
            owners[id(weight)] -= 1
            base.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
                config.tie_word_embeddings = False


def _unshare_all(backbone: PreTrainedModel, owners: Counter[int]) -> None:
    """Give layers that PEFT has replicated weights of their own: a file holds each tensor under one name."""
    tied = {id(module.weight) for module in (backbone.get_input_embeddings(),)}
    for module in backbone.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if owners[id(weight)] > 1 and id(weight) not in tied:
                owners[id(weight)] -= 1
                setattr(module, name, nn.Parameter(weight.detach().clone(), weight.requires_grad))


def _as_dense(backbone: PreTrainedModel) -> PreTrainedModel:
    """Return the backbone with ordinary weights and no trace of how they had been packed."""
    packing = getattr(backbone.config, "quantization_config", None)
    if packing is None:
        return backbone
    method = packing.get("quant_method") if isinstance(packing, Mapping) else packing.quant_method
    if str(getattr(method, "value", method)) != "gguf":
        return backbone.dequantize()
    del backbone.config.quantization_config  # unpacked when it was loaded; with this entry saving refuses
    return backbone
