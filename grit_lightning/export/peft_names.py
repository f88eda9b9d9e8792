"""What PEFT itself would write into `adapter_model.safetensors`, from a model or from a checkpoint without one."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

from grit_lightning.backbones.adapters import attach_adapter, lacks_weights
from grit_lightning.backbones.loading import load_backbone
from grit_lightning.backbones.shapes import empty_backbone
from grit_lightning.errors import FileAccessError, InvalidValueError

ADAPTER = "default"
_FACTOR = re.compile(rf"(?P<layer>.+\.lora_[AB])\.{ADAPTER}\.weight")


def named_by_peft(model: PeftModel) -> dict[str, Tensor]:
    """Return the active adapter of a model under PEFT's names on file.

    Args:
        model: The model, adapter and backbone; tensors of the backbone may be on the meta device.
    """
    with warnings.catch_warnings():  # it looks for the backbone's files to compare vocabularies
        warnings.filterwarnings("ignore", "Could not find a config file", UserWarning)
        named = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    return {name: value.detach() for name, value in named.items()}


def on_file(
    config: PeftConfig, saved: Mapping[str, Tensor], backbone: str, revision: str | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under PEFT's names on file.

    Factors of plain LoRA are renamed by rule. For anything else PEFT is asked, with the backbone's shape and none of its
    weights.

    Args:
        config: The adapter's configuration.
        saved: The checkpoint's tensors under their names inside the `PeftModel`.
        backbone: Where the backbone's configuration is.
        revision: Revision of a hub id.

    Raises:
        ValueError: The tensors do not fit the configuration, or the backbone's configuration is needed and out of reach.
    """
    factors = {name: _FACTOR.fullmatch(name) for name in saved}
    if all(factors.values()):
        return {f"{match['layer']}.weight": saved[name] for name, match in factors.items() if match}
    if not backbone:
        raise InvalidValueError(
            "The checkpoint: expected the name of its backbone, which an adapter with more than LoRA's factors needs to be "
            "exported, got none, since the model was given in memory. Export the module: export_adapter(module, output)."
        )
    try:
        empty = empty_backbone(backbone, dtype=torch.float32, revision=revision)
    except (OSError, ValueError) as error:
        raise FileAccessError(
            "backbone: expected its configuration, which an adapter with more than LoRA's factors needs to be exported, got "
            f"an error: {error}"
        ) from error
    try:
        model = attach_adapter(empty, _without_start(config))
    except RuntimeError as error:
        if not lacks_weights(error):
            raise
        model = attach_adapter(
            load_backbone(backbone, revision=revision), config
        )  # a few methods compute with the weights
    fits: Any = model.load_state_dict(_with_tied(model, saved), strict=False, assign=True)
    if fits.unexpected_keys:
        raise InvalidValueError(
            f"The checkpoint: expected tensors that fit its adapter's configuration, got {fits.unexpected_keys[:3]}, which do "
            "not. Export another one."
        )
    return named_by_peft(model)


def _with_tied(model: PeftModel, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under all of their names: a checkpoint names a tensor that layers share only once."""
    owners = {id(parameter): saved[name] for name, parameter in model.named_parameters() if name in saved}
    named = model.named_parameters(remove_duplicate=False)
    return {**saved, **{name: owners[id(parameter)] for name, parameter in named if id(parameter) in owners}}


def _without_start(config: PeftConfig) -> PeftConfig:
    """Return the configuration with a start that needs no weights."""
    result: Any = copy.deepcopy(config)
    if getattr(result, "init_lora_weights", None):
        result.init_lora_weights = True
    return result
