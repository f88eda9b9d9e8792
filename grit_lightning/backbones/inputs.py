"""What a causal language model takes as input: how many tokens, and which arguments."""

from __future__ import annotations

import inspect
from typing import Any

from peft import PeftModel
from torch import nn

from grit_lightning.errors import InvalidValueError


def context_length(model: nn.Module) -> int | None:
    """Return the largest number of tokens that a model takes; None if its configuration does not say.

    The virtual tokens of a prefix take up some of them.
    """
    config: Any = model.config
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if length is not None and isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        length -= model.active_peft_config.num_virtual_tokens
    return length


def require_context(model: nn.Module, tokens: int, what: str, settings: str) -> None:
    """Check that a sequence fits a model's context.

    Args:
        model: The model.
        tokens: Length of the sequence.
        what: What the sequence is, for the message.
        settings: What to lower if it is too long.

    Raises:
        ValueError: If it does not fit.
    """
    context = context_length(model)
    if context is not None and tokens > context:
        raise InvalidValueError(
            f"Expected at most {context} tokens, the model's context, got {tokens} for {what}. Lower {settings}."
        )


def require_packing(model: nn.Module, accepted: frozenset[str], rows: int) -> None:
    """Check that a model keeps documents that are packed into one row apart.

    Args:
        model: The model.
        accepted: Names of the arguments that it takes, see `accepted_arguments`.
        rows: Rows of the batch.

    Raises:
        ValueError: If it takes no `position_ids`, or its attention kernel or adapter would mix documents up.
    """
    if "position_ids" not in accepted:
        raise InvalidValueError(
            "Packed documents: expected a model that takes position_ids, without which they would attend to each other, got "
            f"{type(_base(model)).__name__}, which takes none. Set data.packing to false, so that a row holds one document."
        )
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise InvalidValueError(
            "Packed documents: expected an adapter without a prefix, behind which they would attend to each other, got "
            f"{type(model.active_peft_config).__name__}. Set data.packing to false, so that a row holds one document."
        )
    kernel = getattr(model.config, "_attn_implementation", None) or ""
    if "flash" in kernel and rows > 1:
        raise InvalidValueError(
            f"Packed documents: expected batches of one row, as {kernel} keeps documents apart only in those, got {rows} rows. "
            "Set data.batch_size to 1 and raise trainer.accumulate_grad_batches, or set model.attn_implementation to sdpa."
        )


def accepted_arguments(model: nn.Module) -> frozenset[str]:
    """Return the names of the arguments of a model's forward pass; for a PEFT model, those of its base model."""
    return frozenset(inspect.signature(_base(model).forward).parameters)


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model
