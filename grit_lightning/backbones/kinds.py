"""Which kinds of models can be trained: causal language models, told from their configuration alone."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from grit_lightning.errors import InvalidValueError

OTHER_HEADS = (
    "ForAudioClassification",
    "ForImageClassification",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
)
"""Endings of the names of transformers' classes whose head does something else than predict the next token."""


def require_causal(config: PreTrainedConfig, saved_as: Sequence[str]) -> None:
    """Check that a model predicts each token from those before it.

    Args:
        config: Its configuration.
        saved_as: Class names of what was saved, as in `config.architectures`; empty if unknown.

    Raises:
        ValueError: If it does not; says what it is.
    """
    kind = _other_kind(config, saved_as)
    if kind is not None:
        name = saved_as[0] if saved_as else type(config).__name__
        raise InvalidValueError(
            f"backbone: expected a causal language model, which predicts each token from those before it, got {name}, {kind}. "
            "Set backbone to a model like Llama, Qwen, Mistral, Gemma or GPT-2."
        )


def require_causal_model(model: PreTrainedModel) -> None:
    """Check the same of a model in memory.

    Raises:
        ValueError: If it is of another kind, or has no head that predicts tokens.
    """
    require_causal(model.config, [type(model).__name__])
    if model.get_output_embeddings() is None:
        raise InvalidValueError(
            f"backbone: expected a causal language model, got {type(model).__name__}, which has no head that predicts tokens. "
            "Load it with AutoModelForCausalLM."
        )


def _other_kind(config: PreTrainedConfig, saved_as: Sequence[str]) -> str | None:
    """Say what a model is that is no causal language model; None for one that is."""
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    if any(name.endswith(OTHER_HEADS) for name in saved_as):
        return "whose head is for another task"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return (
            "which also sees the tokens that it predicts and those behind them (is_decoder is false in its config.json)"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return "a model of images and text, which transformers cannot load for text alone"
        return f"of the type {config.model_type}, for which transformers has no causal language model"
    headless = any(name.endswith("Model") and not name.endswith("HeadModel") for name in saved_as)
    if headless and not config.get_text_config().tie_word_embeddings:
        return "saved without the head that predicts tokens"
    return None
