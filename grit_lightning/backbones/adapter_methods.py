"""Which PEFT methods and settings can be trained here, told from the configuration alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftType, TaskType

from grit_lightning.errors import InvalidValueError

_BEFORE_THE_PADDING = (
    "which puts virtual tokens before a row's padding, so that an answer would depend on the other rows of its batch. Use "
    "PrefixTuningConfig or LoraConfig"
)
_TASK_IDS = "which needs a task id for each row, and batches have none. Use LoraConfig"
REFUSED_METHODS: Mapping[PeftType, str] = {
    PeftType.PROMPT_TUNING: _BEFORE_THE_PADDING,
    PeftType.P_TUNING: _BEFORE_THE_PADDING,
    PeftType.CPT: _BEFORE_THE_PADDING,
    PeftType.MULTITASK_PROMPT_TUNING: _TASK_IDS,
    PeftType.POLY: _TASK_IDS,
    PeftType.LILY: "whose experts are chosen by all tokens of a batch, those to be predicted included. Use LoraConfig",
    PeftType.XLORA: "which mixes adapters that are trained already. Use LoraConfig",
}
"""Methods of PEFT that cannot be trained on these batches, with the reason and what to use."""

WITHOUT_GENERATION = (PeftType.CARTRIDGE, PeftType.PREFIX_TUNING, PeftType.SHADOW)
"""Methods that generate other tokens than their own forward pass finds likeliest (peft 0.21: it loses a prefix)."""

PREPARED_INITIALISATIONS: Mapping[str, str] = {
    "eva": "the activations of training rows",
    "corda": "the covariances of activations (preprocess_corda)",
    "lora_ga": "the gradients of the full weights (preprocess_loraga)",
}
"""Values of `init_lora_weights` for which something has to be measured first; PEFT goes on without it, or fails late."""


def require_method(adapter: PeftConfig) -> None:
    """Check that a method can be trained, and that no setting keeps it from learning or is of no effect.

    Raises:
        ValueError: If it cannot; names the setting.
    """
    if adapter.peft_type in REFUSED_METHODS:
        raise InvalidValueError(
            f"adapter: expected a PEFT method that learns from batches of text alone, got {type(adapter).__name__}, "
            f"{REFUSED_METHODS[adapter.peft_type]}."
        )
    if adapter.task_type not in (None, TaskType.CAUSAL_LM):
        raise InvalidValueError(
            f"adapter.task_type: expected CAUSAL_LM, the task that is trained, got {adapter.task_type}. Set it to CAUSAL_LM."
        )
    _require_ranks(adapter)
    _require_effect(adapter)
    _require_initialisation(adapter)


def require_generation(adapter: PeftConfig) -> None:
    """Check that PEFT generates with a method what it has learnt.

    Raises:
        ValueError: If it does not.
    """
    if adapter.peft_type in WITHOUT_GENERATION:
        raise InvalidValueError(
            f"model.generation: expected null, as answers generated with a {type(adapter).__name__} are not those of its "
            "forward pass, got settings. Set it to null, or use a LoraConfig."
        )


def _require_ranks(adapter: PeftConfig) -> None:
    """Refuse ranks that are not positive integers; a method may have 0 as its default (OFT counts blocks by their size)."""
    ranks = {name: getattr(adapter, name, None) for name in ("r", "init_r")}
    ranks = {name: rank for name, rank in ranks.items() if rank != getattr(type(adapter), name, None)}
    for name, rank in {**ranks, **_pattern(adapter, "rank_pattern")}.items():
        if isinstance(rank, int | float) and (rank <= 0 or rank != int(rank)):
            raise InvalidValueError(f"adapter.{name}: expected a positive rank, got {rank}.")


def _require_effect(adapter: PeftConfig) -> None:
    """Refuse settings under which nothing is learnt, or that do nothing here."""
    alphas = {name: getattr(adapter, name, None) for name in ("alpha", "lora_alpha")}
    for name, alpha in {**alphas, **_pattern(adapter, "alpha_pattern")}.items():
        if alpha == 0:
            raise InvalidValueError(
                f"adapter.{name}: expected a number other than 0, at which nothing is learnt, got 0."
            )
    for field in dataclasses.fields(adapter):
        share = getattr(adapter, field.name)
        if field.name.endswith("dropout") and isinstance(share, int | float) and not 0 <= share < 1:
            raise InvalidValueError(f"adapter.{field.name}: expected a share in [0, 1), got {share}.")
    if getattr(adapter, "use_qalora", False):
        raise InvalidValueError(
            "adapter.use_qalora: expected false, as it only acts on GPTQ weights, got true. Set quantization to nf4 instead."
        )
    if getattr(adapter, "arrow_config", None) is not None:
        raise InvalidValueError(
            "adapter.arrow_config: expected null, as Arrow routes between adapters that are trained already, got a config."
        )


def _pattern(adapter: PeftConfig, name: str) -> dict[str, Any]:
    """Return a pattern of values by layer, each under the name of its setting."""
    return {f"{name}[{layer!r}]": value for layer, value in (getattr(adapter, name, None) or {}).items()}


def _require_initialisation(adapter: PeftConfig) -> None:
    """Refuse initialisations that need something measured first, or a GPU where there is none."""
    chosen = getattr(adapter, "init_lora_weights", True)
    name = chosen.lower() if isinstance(chosen, str) else ""
    if name in PREPARED_INITIALISATIONS:
        raise InvalidValueError(
            "adapter.init_lora_weights: expected an initialisation that needs no data, got "
            f"{chosen}, for which {PREPARED_INITIALISATIONS[name]} would have to be measured first. Set it to true, gaussian, "
            "orthogonal, olora or pissa."
        )
    if name == "loftq" and not torch.cuda.is_available():
        raise InvalidValueError(
            "adapter.init_lora_weights: expected one that this machine can compute, got loftq, for which PEFT needs a GPU. Set "
            "it to true, gaussian, orthogonal, olora or pissa."
        )
