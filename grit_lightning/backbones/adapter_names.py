"""Checks that every name and number in an adapter's configuration stands for something in the model.

PEFT goes on if only some of them do, and the rest is then not trained without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grit_lightning.errors import InvalidValueError

MODULE_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules")
"""Settings that list names of modules, by their last parts; instead of a list some take a regular expression."""
TOKEN_IDS = ("trainable_token_indices", "token_indices", "alora_invocation_tokens")
"""Settings that list tokens of the vocabulary, some of them by the name of the embedding."""


def require_names(model: PreTrainedModel, adapter: PeftConfig) -> None:
    """Check an adapter's settings against the modules of the model that it is for.

    Args:
        model: The model without the adapter; its weights are not looked at.
        adapter: The configuration.

    Raises:
        ValueError: If a name matches nothing, or a layer or token is not there; names what comes closest.
    """
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for setting in MODULE_NAMES:
        _require_modules(model, setting, getattr(adapter, setting, None), modules)
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    _require_suffixes(model, "target_parameters", getattr(adapter, "target_parameters", None) or (), parameters)
    _require_layers(model, adapter, modules)
    for setting in TOKEN_IDS:
        _require_tokens(model, setting, getattr(adapter, setting, None), modules)


def require_patterns(model: PeftModel, adapter: PeftConfig) -> None:
    """Check that every key of `rank_pattern` and `alpha_pattern` matches a layer that the adapter has got.

    Args:
        model: The model with the adapter.
        adapter: The configuration.

    Raises:
        ValueError: If one matches none.
    """
    adapted: list[str] = getattr(model.base_model, "targeted_module_names", [])
    for setting in ("rank_pattern", "alpha_pattern"):
        keys = getattr(adapter, setting, None) or {}
        missing = [key for key in keys if not any(re.match(rf"(.*\.)?({key})$", name) for name in adapted)]
        if missing:
            raise InvalidValueError(
                f"adapter.{setting}: expected names of layers that the adapter is attached to, {_last_parts(adapted)}, got "
                f"{sorted(keys)}, of which {missing} match none.{_suggest(missing, adapted)} Correct them, or leave them out."
            )


def describe_layers(model: nn.Module) -> str:
    """Name the kinds of linear layers of a model, for a message about its targets."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return f"Its linear layers: {_last_parts(linear)}. Set adapter.target_modules to some of them."


def _require_modules(model: nn.Module, setting: str, given: Any, modules: Sequence[str]) -> None:
    if isinstance(given, list | tuple | set):
        _require_suffixes(model, setting, given, modules)
    elif isinstance(given, str) and setting == "exclude_modules" and not any(re.fullmatch(given, m) for m in modules):
        raise InvalidValueError(
            f"adapter.{setting}: expected a regular expression for names of modules of the {type(model).__name__}, got "
            f"{given!r}, which matches none. Correct it, or leave it out."
        )


def _require_suffixes(model: nn.Module, setting: str, given: Iterable[str], names: Sequence[str]) -> None:
    """Refuse entries that are neither a name nor the end of one, even if others are."""
    missing = sorted(entry for entry in given if not any(f".{name}".endswith(f".{entry}") for name in names))
    if missing:
        what = "parameters" if setting == "target_parameters" else "layers"
        advice = describe_layers(model) if setting == "target_modules" else "Correct them, or leave them out."
        raise InvalidValueError(
            f"adapter.{setting}: expected names of {what} of the {type(model).__name__}, got {sorted(given)}, of which "
            f"{missing} match none.{_suggest(missing, names)} {advice}"
        )


def _require_layers(model: nn.Module, adapter: PeftConfig, modules: Sequence[str]) -> None:
    """Refuse numbers of layers that the model does not have, and names of stacks of layers that are none."""
    given = getattr(adapter, "layers_to_transform", None)
    numbers = {given} if isinstance(given, int) else set(given or ())
    if not numbers:
        return
    stacks = getattr(adapter, "layers_pattern", None) or [r"[^.]*"]
    stacks = [stacks] if isinstance(stacks, str) else stacks
    if isinstance(targets := adapter.target_modules, list | set):
        modules = [name for name in modules if any(f".{name}".endswith(f".{target}") for target in targets)]
    found: set[int] = set()
    for stack in stacks:
        # as PEFT looks for them: the first number in a name is that of the layer, a second one that of an expert
        matches = (re.match(rf"(?:^|.*?\.){stack}\.(\d+)\.", name) for name in modules)
        layers = {int(match[1]) for match in matches if match}
        if not layers:
            lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
            raise InvalidValueError(
                f"adapter.layers_pattern: expected a list of layers of the {type(model).__name__}, {_last_parts(lists)}, got "
                f"{stack!r}, which is none.{_suggest([stack], lists)}"
            )
        found |= layers
    if missing := sorted(numbers - found):
        raise InvalidValueError(
            f"adapter.layers_to_transform: expected numbers of layers of the {type(model).__name__} that have a target, from "
            f"{min(found)} to {max(found)}, got {sorted(numbers)}, of which {missing} are none. Leave them out."
        )


def _require_tokens(model: PreTrainedModel, setting: str, given: Any, modules: Sequence[str]) -> None:
    """Refuse tokens that are outside the vocabulary of their embedding."""
    if not given:
        return
    if isinstance(given, dict):
        _require_suffixes(model, setting, given, modules)
        tables = {name: next(model.get_submodule(m) for m in modules if f".{m}".endswith(f".{name}")) for name in given}
    else:
        tables, given = {"": model.get_input_embeddings()}, {"": given}
    for name, tokens in given.items():
        rows = tables[name].weight.shape[0]
        if outside := [token for token in tokens if not 0 <= token < rows]:
            raise InvalidValueError(
                f"adapter.{setting}: expected token ids from 0 to {rows - 1}, the rows of the embedding, got {outside}. Resize "
                "the backbone's embeddings first, or leave them out."
            )


def _suggest(missing: Iterable[str], names: Iterable[str]) -> str:
    """Name for each entry what comes closest to it among the names and their ends."""
    parts = {".".join(pieces[start:]) for pieces in (name.split(".") for name in names) for start in range(len(pieces))}
    close = [match[0] for entry in missing if (match := get_close_matches(entry, sorted(parts), n=1))]
    return f" Did you mean {', '.join(close)}?" if close else ""


def _last_parts(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))
