"""Slice a trained LoRA adapter to its effective ranks: the same function with fewer parameters.

```text
    allocated r                    exported k            ΔW = scaling · B A
    A [r, d_in]    rows 0 … k      A [k, d_in]           B's columns k … r are exactly zero, so the rows of A that
    B [d_out, r]   columns 0 … k   B [d_out, k]          they meet add nothing and both can go.
```

PEFT recomputes the scaling from alpha and rank (`alpha / r`, for rsLoRA `alpha / sqrt(r)`), so a smaller rank needs its
own alpha. Ranks and alphas that differ from the adapter's go into `rank_pattern` and `alpha_pattern`. Their keys are
regular expressions which PEFT also lets match the end of a longer name: ours are whole names, escaped and anchored.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from grit_lightning.errors import InvalidValueError

_FACTOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.[^.]+\.weight")
_WHOLE_MODULE = re.compile(r"(?P<module>base_model\.model\..+)\.modules_to_save\.[^.]+\.(?P<parameter>.+)")
_SITE_PREFIX = "base_model.model."
# Initialisations that leave the backbone as it is; the others (PiSSA, OLoRA, CorDA, LoftQ …) move a part of it into A and B.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class CompactAdapter:
    """An adapter in PEFT's file format.

    Attributes:
        config: Configuration that rebuilds the adapter on a fresh backbone.
        tensors: Parameters under the names of `adapter_model.safetensors`, contiguous, on the CPU.
        ranks: Rank k of every adapted layer by its name in the backbone; 0 for a layer that was left out.
        allocated: Rank r of every adapted layer while it was trained.
        parameters_before: Number of trained parameters.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    ranks: dict[str, int]
    allocated: dict[str, int]
    parameters_before: int

    @property
    def parameters(self) -> int:
        """Number of parameters that are left."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def mean_rank(self) -> float:
        """Mean rank over all adapted layers, those left out included."""
        return sum(self.ranks.values()) / len(self.ranks)


@torch.no_grad()
def compact(
    config: PeftConfig,
    trained: Mapping[str, Tensor],
    effective_ranks: Mapping[str, int] | None = None,
    *,
    keep_empty: bool = False,
) -> CompactAdapter:
    """Slice every layer's factors to the last column of B that is not zero.

    Args:
        config: The configuration that the adapter was trained with.
        trained: The trained parameters under their names inside the `PeftModel`.
        effective_ranks: Ranks that the geometry holds, by module name; checked against B. None without geometry.
        keep_empty: Keep a layer whose B is zero at rank 1, instead of leaving it out through `exclude_modules`.

    Returns:
        The smaller adapter. Its scalings are those of training in float32; as doubles they can be off in the last place,
        where no alpha gives the same quotient.

    Raises:
        ValueError: If the adapter is not a plain linear LoRA, holds numbers that are not finite, was never trained, or
            B reaches beyond an effective rank.
    """
    config = _require_plain_lora(config)
    factors, others = _sort(trained)
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

    if keep_empty:
        ranks = {layer: max(rank, 1) for layer, rank in ranks.items()}
    kept = {layer: rank for layer, rank in ranks.items() if rank}
    scalings = {layer: _scaling(config, layer, allocated[layer]) for layer in kept}
    tensors = dict(others)
    for layer, rank in kept.items():
        a, b = factors[layer]
        tensors[f"{_SITE_PREFIX}{layer}.lora_A.weight"] = a[:rank].cpu().clone()
        tensors[f"{_SITE_PREFIX}{layer}.lora_B.weight"] = b[:, :rank].cpu().clone(memory_format=torch.contiguous_format)
    return CompactAdapter(
        config=_compact_config(config, kept, scalings, [layer for layer, rank in ranks.items() if not rank]),
        tensors=tensors,
        ranks=ranks,
        allocated=allocated,
        parameters_before=sum(tensor.numel() for tensor in trained.values()),
    )


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


def _require_plain_lora(config: PeftConfig) -> LoraConfig:
    if type(config) is not LoraConfig:
        raise InvalidValueError(
            f"The adapter: expected LoRA, which alone can be compacted, got {type(config).__name__} ({config.peft_type}). "
            "Save it with module.model.save_pretrained(folder)."
        )
    fields: Mapping[str, Any] = vars(config)
    for name in ("use_dora", "use_bdlora", "target_parameters", "trainable_token_indices"):
        if fields.get(name):
            raise InvalidValueError(
                f"adapter.{name}: expected it switched off, since slicing A and B would change the model, got "
                f"{fields[name]!r}. Train without it, or save the adapter as it is with module.model.save_pretrained(folder)."
            )
    if config.init_lora_weights not in _PLAIN_INITIALISATIONS:
        raise InvalidValueError(
            f"adapter.init_lora_weights: expected one of {_PLAIN_INITIALISATIONS}, got {config.init_lora_weights!r}, which "
            "moves a part of the backbone into the adapter: sliced, it would not fit the original backbone."
        )
    return config


def _sort(trained: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Split the trained parameters into (A, B) by layer, and those of whole modules under their names on file."""
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    others: dict[str, Tensor] = {}
    unsupported = []
    for name, tensor in trained.items():
        if (factor := _FACTOR.fullmatch(name)) and tensor.ndim == 2:
            sides[factor["side"]][factor["layer"]] = tensor
        elif whole := _WHOLE_MODULE.fullmatch(name):
            others[f"{whole['module']}.{whole['parameter']}"] = tensor.cpu().clone()
        else:
            unsupported.append(name)
    if unsupported or not sides["A"]:
        raise InvalidValueError(
            f"The adapter: expected linear LoRA layers and modules_to_save, got {len(unsupported)} of {len(trained)} trained "
            f"parameters of another kind (embedding adapters, DoRA magnitudes, biases …): {unsupported[:3]}. "
            "Take these out of the adapter's configuration."
        )
    if sides["A"].keys() != sides["B"].keys():
        lonely = sorted(sides["A"].keys() ^ sides["B"].keys())
        raise InvalidValueError(
            f"The adapter: expected A and B of every layer, got only one of them in {lonely[:3]}. Export another checkpoint."
        )
    if infinite := [name for name, tensor in trained.items() if not bool(tensor.isfinite().all())]:
        raise InvalidValueError(
            f"The adapter: expected finite weights, got NaN or infinity in {len(infinite)} trained parameters, first "
            f"{infinite[0]}. The training diverged: export an earlier checkpoint."
        )
    return {layer: (a, sides["B"][layer]) for layer, a in sides["A"].items()}, others


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
