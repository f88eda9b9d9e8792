"""Slice a trained LoRA adapter to its effective ranks: the same function with fewer parameters.

```text
    allocated r                    exported k            ΔW = scaling · B A
    A [r, d_in]    rows 0 … k      A [k, d_in]           B's columns k … r are exactly zero, so the rows of A that
    B [d_out, r]   columns 0 … k   B [d_out, k]          they meet add nothing and both can go.
```

PEFT recomputes the scaling from alpha and rank (`alpha / r`, for rsLoRA `alpha / sqrt(r)`), so a smaller rank needs its
own alpha. Ranks and alphas that differ from the adapter's go into `rank_pattern` and `alpha_pattern`. Their keys are
regular expressions which PEFT also lets match the end of a longer name: ours are whole names, escaped and anchored.

Where the start moved s·B₀A₀ out of the backbone (see `backbones.moved_start`), rows A₀ and columns −B₀ put it back: the file
then fits the backbone as everybody has it. What cannot be sliced is exported as PEFT would write it, whole.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from grit_lightning.errors import InvalidValueError

_FACTOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
_SITE_PREFIX = "base_model.model."
# Variants of LoRA whose layers compute something else than the backbone's output + s·BA x with BA's own numbers.
_VARIANTS = (
    *("use_bdlora", "use_qalora", "target_parameters", "layer_replication", "lora_bias", "megatron_config"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
)


@dataclass(frozen=True)
class CompactAdapter:
    """An adapter in PEFT's file format.

    Attributes:
        config: Configuration that rebuilds the adapter on a fresh backbone.
        tensors: Parameters under the names of `adapter_model.safetensors`, contiguous, on the CPU.
        parameters_before: Number of parameters while it was trained.
        ranks: Rank k of every adapted layer by its name in the backbone; 0 for a layer that was left out.
        allocated: Rank r of every adapted layer while it was trained.
        whole: Why the adapter was not sliced; empty if it was. It then has no ranks.
    """

    config: PeftConfig
    tensors: dict[str, Tensor]
    parameters_before: int
    ranks: dict[str, int] = field(default_factory=dict)
    allocated: dict[str, int] = field(default_factory=dict)
    whole: str = ""

    @property
    def parameters(self) -> int:
        """Number of parameters that are left."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def mean_rank(self) -> float:
        """Mean rank over all adapted layers, those left out included; NaN for an adapter that was not sliced."""
        return sum(self.ranks.values()) / len(self.ranks) if self.ranks else math.nan


@torch.no_grad()
def compact(
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    effective_ranks: Mapping[str, int] | None = None,
    start: Mapping[str, Tensor] | None = None,
    *,
    keep_empty: bool = False,
) -> CompactAdapter:
    """Slice every layer's factors to the last column of B that is not zero, if this is an adapter that can be sliced.

    Args:
        config: The configuration that the adapter was trained with.
        tensors: What was trained, under PEFT's names on file.
        effective_ranks: Ranks that the geometry holds, by module name; checked against B. None without geometry.
        start: A₀ and B₀ under the same names, if they were subtracted from the backbone; they are added to A and B.
        keep_empty: Keep a layer whose B is zero at rank 1, instead of leaving it out through `exclude_modules`.

    Returns:
        The smaller adapter. Its scalings are those of training in float32; as doubles they can be off in the last place,
        where no alpha gives the same quotient.

    Raises:
        ValueError: If the adapter holds numbers that are not finite, was never trained, or B reaches beyond an effective
            rank.
    """
    _require_finite(tensors)
    factors, others = _sort(tensors)
    if reason := _why_whole(config, factors, others):
        if start:
            raise InvalidValueError(
                f"adapter.init_lora_weights: expected one that leaves the backbone as it is with {reason}, got "
                f"{getattr(config, 'init_lora_weights', None)!r}: what it moved cannot be put back."
            )
        return _as_it_is(config, tensors, reason)
    assert isinstance(config, LoraConfig)
    ranks, allocated = {}, {}
    for layer, (a, b) in factors.items():
        used = b.count_nonzero(dim=0).nonzero()
        ranks[layer], allocated[layer] = int(used.max()) + 1 if len(used) else 0, len(a)
        wanted = (effective_ranks or {}).get(_SITE_PREFIX + layer, len(a))
        if ranks[layer] > wanted:
            raise InvalidValueError(
                f"Layer '{layer}': expected zeros in B beyond its effective rank {wanted}, got a column {ranks[layer]} that "
                "is not zero. The checkpoint contradicts itself, and slicing would change the model: export another one."
            )
    if not any(ranks.values()):
        raise InvalidValueError(
            "The adapter: expected trained weights, got a B of zeros in every layer. Export a checkpoint that was written "
            "after at least one optimizer step with a learning rate above zero."
        )

    has_more = {layer for layer in factors if any(name.startswith(f"{_SITE_PREFIX}{layer}.") for name in others)}
    ranks = {layer: max(rank, 1) if keep_empty or layer in has_more else rank for layer, rank in ranks.items()}
    scalings = {layer: _scaling(config, layer, rank) for layer, rank in allocated.items()}
    sliced = {layer: (a[: ranks[layer]], b[:, : ranks[layer]]) for layer, (a, b) in factors.items()}
    if start:
        sliced = {layer: _with_start(*pair, *_sort(start)[0][layer]) for layer, pair in sliced.items()}
    ranks = {layer: len(a) for layer, (a, _) in sliced.items()}
    kept = {layer: rank for layer, rank in ranks.items() if rank}
    result = _on_cpu(others)
    for layer in kept:
        a, b = sliced[layer]
        result |= _on_cpu({f"{_SITE_PREFIX}{layer}.lora_A.weight": a, f"{_SITE_PREFIX}{layer}.lora_B.weight": b})
    return CompactAdapter(
        config=_compact_config(config, kept, scalings, [layer for layer, rank in ranks.items() if not rank]),
        tensors=result,
        parameters_before=_count(tensors),
        ranks=ranks,
        allocated=allocated,
    )


def _as_it_is(config: PeftConfig, tensors: Mapping[str, Tensor], reason: str) -> CompactAdapter:
    config = copy.deepcopy(config)
    config.inference_mode = True
    return CompactAdapter(config, _on_cpu(tensors), _count(tensors), whole=reason)


def _with_start(a: Tensor, b: Tensor, start_a: Tensor, start_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of BA − B₀A₀."""
    return torch.cat([a, start_a.to(a)]), torch.cat([b, -start_b.to(b)], dim=1)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def alpha_for(scaling: float, rank: int, use_rslora: bool) -> float:
    """Return the alpha from which PEFT recomputes `scaling` at `rank`, or its nearest double; an int where that is exact.

    Example:
        >>> alpha_for(2.0, 3, use_rslora=False)
        6
        >>> alpha_for(16 / math.sqrt(8), 2, use_rslora=True)  # 16 / √8 · √2, rounded
        8
    """
    divisor = math.sqrt(rank) if use_rslora else float(rank)
    product = scaling * divisor
    neighbours = (product, math.nextafter(product, 0.0), math.nextafter(product, math.inf))
    # min keeps the first of equals: the whole number, if that is exact
    best = min((float(round(product)), *neighbours), key=lambda alpha: abs(alpha / divisor - scaling))
    return int(best) if best.is_integer() else best


def _why_whole(config: PeftConfig, factors: Mapping[str, tuple[Tensor, Tensor]], others: Mapping[str, Tensor]) -> str:
    """Return what keeps an adapter from being sliced, empty if nothing does."""
    if type(config) is not LoraConfig:
        return f"{config.peft_type and config.peft_type.value}, which is no LoRA"
    fields: Mapping[str, Any] = vars(config)
    if variants := [name for name in _VARIANTS if fields.get(name)]:
        return variants[0]
    if stacked := [layer for layer, (a, _) in factors.items() if len(a) != _configured_rank(config, layer)]:
        return f"adapters of stacked weights ({stacked[0]})"
    if others_of_rank := [name for name in others if "lora_" in name and "lora_magnitude_vector" not in name]:
        return f"adapters of another kind than linear layers ({others_of_rank[0].rpartition('.lora_')[0]})"
    return "" if factors else "no linear layer"


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Split what was trained into (A, B) of linear layers by layer, and the rest."""
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (factor := _FACTOR.fullmatch(name)) and tensor.ndim == 2:
            sides[factor["side"]][factor["layer"]] = tensor
        else:
            others[name] = tensor
    if sides["A"].keys() != sides["B"].keys():
        lonely = sorted(sides["A"].keys() ^ sides["B"].keys())
        raise InvalidValueError(
            f"The adapter: expected A and B of every layer, got only one of them in {lonely[:3]}. Export another checkpoint."
        )
    return {layer: (a, sides["B"][layer]) for layer, a in sides["A"].items()}, others


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    if not tensors:
        raise InvalidValueError(
            "The adapter: expected trained parameters, got none. Export a checkpoint or module that has been trained."
        )
    if infinite := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise InvalidValueError(
            f"The adapter: expected finite weights, got NaN or infinity in {len(infinite)} trained parameters, first "
            f"{infinite[0]}. The training diverged: export an earlier checkpoint."
        )


def _configured_rank(config: LoraConfig, layer: str) -> int:
    return int(config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), layer), config.r))


def _scaling(config: LoraConfig, layer: str, r: int) -> float:
    """Return the factor in front of B A as PEFT computed it while training."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), layer), config.lora_alpha)
    return float(alpha / (math.sqrt(r) if config.use_rslora else r))


def _compact_config(
    config: LoraConfig, ranks: Mapping[str, int], scalings: Mapping[str, float], empty: list[str]
) -> LoraConfig:
    """Describe the sliced adapter: largest rank as `r`, what differs as patterns, layers without rank excluded."""
    alphas = {layer: alpha_for(scalings[layer], rank, config.use_rslora) for layer, rank in ranks.items()}
    widest = max(ranks, key=lambda layer: ranks[layer])
    result = copy.deepcopy(config)
    result.r, result.lora_alpha = ranks[widest], alphas[widest]
    result.rank_pattern = {_whole(layer): rank for layer, rank in ranks.items() if rank != result.r}
    result.alpha_pattern = {_whole(layer): alpha for layer, alpha in alphas.items() if alpha != result.lora_alpha}
    result.inference_mode = True
    # how A and B were initialised no longer matters, and a data-driven initialisation would only cost time again
    result.init_lora_weights, result.eva_config = True, None
    if empty:
        names = "|".join(re.escape(layer) for layer in empty)
        before = config.exclude_modules
        if before and not isinstance(before, str):  # a list also matches the ends of names
            before = rf"(.*\.)?({'|'.join(re.escape(name) for name in before)})"
        result.exclude_modules = f"({before})|{names}" if before else names
    return result


def _whole(layer: str) -> str:
    return "^" + re.escape(layer)
