"""What an adapter was attached to: another model refuses its checkpoints by that, and exports find the backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from grit_lightning.backbones.fingerprint import backbone_fingerprint
from grit_lightning.backbones.moved_start import moves_backbone, start_of
from grit_lightning.errors import InvalidTypeError, InvalidValueError

ADAPTER = "default"
"""The name that PEFT gives to an adapter, by which its tensors are found in checkpoints."""

LEAVE_BACKBONE = ("gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the backbone as it is."""


@dataclass(frozen=True)
class AdapterOrigin:
    """What an adapter is, and what it was attached to.

    Attributes:
        fingerprint: The backbone's, see `backbones.fingerprint`.
        adapter: `to_dict` of PEFT's configuration.
        start: A₀ and B₀ of a start that moved the backbone, see `backbones.moved_start`; empty for other adapters.
        source: `backbone` (its name, or nothing), `dtype`, `quantization` and `revision` as `load_backbone` takes them.
        backbone: Parameters and buffers of the backbone; None to find them in the model when they are needed.
    """

    fingerprint: Mapping[str, Any]
    adapter: Mapping[str, Any]
    start: Mapping[str, Tensor]
    source: Mapping[str, Any]
    backbone: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, model: PeftModel) -> AdapterOrigin:
        """Read off a model what it was made of, before it is trained.

        Raises:
            TypeError: If it is no `PeftModel`.
            ValueError: If its active adapter is not the one that `get_peft_model` attaches.
        """
        if not isinstance(model, PeftModel):
            raise InvalidTypeError(
                f"model: expected a peft.PeftModel, got a {type(model).__name__}. Make one with peft.get_peft_model."
            )
        if model.active_adapters != [ADAPTER]:
            raise InvalidValueError(
                f"model: expected one whose active adapter has the name {ADAPTER!r}, got {model.active_adapters}. Leave out "
                "adapter_name where it is attached, or call model.set_adapter."
            )
        config: Any = model.peft_config[ADAPTER]
        _require_known_start(config)
        backbone: Any = model.get_base_model()
        source = {
            "backbone": getattr(backbone.config, "_name_or_path", "") or "",
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "quantization": "nf4" if getattr(backbone, "is_loaded_in_4bit", False) else None,
            "revision": config.revision,
        }
        return cls(backbone_fingerprint(backbone), config.to_dict(), start_of(model, config, {}), source)


def _require_known_start(adapter: PeftConfig) -> None:
    """Refuse starts that may have replaced weights of the backbone, of which nothing is left to see."""
    start = getattr(adapter, "init_lora_weights", None)
    if isinstance(start, str) and start.lower() not in LEAVE_BACKBONE and not moves_backbone(adapter):
        raise InvalidValueError(
            f"adapter.init_lora_weights: expected true, false, {', '.join(LEAVE_BACKBONE)}, pissa or olora in a module of your "
            f"own, got {start!r}, which may replace weights of the backbone: no checkpoint or export could give the trained "
            "model back. Set it to another."
        )


def backbone_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Find the parameters and buffers of an adapted model that are no part of its adapter.

    Args:
        model: With PEFT's layers in place.
    """
    adapter = {
        id(tensor)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name in (*layer.adapter_layer_names, *layer.other_param_names)
        for tensor in _tensors(getattr(layer, name, None))
    }
    yield from (tensor for tensor in _tensors(model) if id(tensor) not in adapter)


def _tensors(part: object) -> Iterator[Tensor]:
    if isinstance(part, nn.Module):
        yield from part.parameters()
        yield from part.buffers()
    elif torch.is_tensor(part):
        yield part
