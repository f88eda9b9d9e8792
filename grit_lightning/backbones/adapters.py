"""Attaching a PEFT adapter to a backbone, after every setting of it has been checked against the model."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from grit_lightning.backbones.adapter_methods import require_method
from grit_lightning.backbones.adapter_names import describe_layers, require_names, require_patterns
from grit_lightning.errors import InvalidValueError

_UNUSABLE = (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError)
"""What PEFT raises about settings that it cannot build."""


def attach_adapter(model: PreTrainedModel, adapter: PeftConfig) -> PeftModel:
    """Wrap `model` with a new trainable adapter in float32, whatever the dtype of the backbone, in training mode.

    Args:
        model: The backbone; its layers are replaced in place. On the meta device, only shapes are made.
        adapter: Any PEFT configuration, also one that was saved with a trained adapter. It is copied, so that one object can
            serve several models.

    Raises:
        ValueError: If the model already carries an adapter, the method cannot be trained, a rank is not positive, or a name,
            layer or token in the configuration is not in the model (the message lists what is).
    """
    require_plain(model)
    require_method(adapter)
    require_names(model, adapter)
    settings = copy.deepcopy(adapter)
    settings.inference_mode = False  # what is saved with a trained adapter has it set, and nothing would be trained
    settings.base_model_name_or_path = None
    peft_model = _wrap(model, settings)
    try:
        require_patterns(peft_model, adapter)
        _require_trained(peft_model, adapter)
    except InvalidValueError:
        if hasattr(peft_model.base_model, "unload"):
            peft_model.base_model.unload()
        raise
    return peft_model.train()


def require_plain(model: nn.Module) -> None:
    """Check that a model does not carry an adapter.

    Raises:
        ValueError: If it does.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InvalidValueError(
            "backbone: expected a model without an adapter, got one that already carries an adapter. Give a plain model, or "
            "call unload() on it first."
        )


def _wrap(model: PreTrainedModel, adapter: PeftConfig) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT asks for a property that transformers has renamed; keys that match nothing are refused afterwards
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        try:
            return get_peft_model(model, adapter, autocast_adapter_dtype=True)
        except _UNUSABLE as error:
            if lacks_weights(error):
                raise
            if "target" in str(error).lower():
                raise InvalidValueError(
                    "adapter.target_modules: expected layers that PEFT can adapt, got "
                    f"{_printable(getattr(adapter, 'target_modules', None))}: {_sentence(error)} {describe_layers(model)}"
                ) from error
            raise InvalidValueError(
                f"adapter: expected a {type(adapter).__name__} that PEFT can attach to the {type(model).__name__}, got one "
                f"that it cannot: {_sentence(error)} Change the setting that it names."
            ) from error


def _require_trained(model: PeftModel, adapter: PeftConfig) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidValueError(
            f"adapter: expected a configuration with something to train, got {type(adapter).__name__}, whose parameters are "
            "all frozen. Use another method, such as LoraConfig."
        )


def lacks_weights(error: Exception) -> bool:
    """Say whether an error is that of a computation with weights that are on the meta device."""
    return isinstance(error, RuntimeError) and "meta" in str(error).lower()


def _sentence(error: Exception) -> str:
    return f"{str(error).strip().rstrip('.')}."


def _printable(targets: Any) -> Any:
    """Return targets as a list in a fixed order where they are a set."""
    return sorted(targets) if isinstance(targets, set) else targets
