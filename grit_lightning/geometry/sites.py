"""Finds the LoRA layers of a PEFT model: which modules are adapted, with which factors, at which rank.

```text
            x [.., d_in] ──► W ─────────────────────────► (+) ──► y [.., d_out]
                 │                                         ▲
                 └──► lora_A [r, d_in] ──► a [.., r] ──► lora_B [d_out, r] · scaling
                                           ▲
                                           └ the only place the geometry listens at
```
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from torch import nn

from grit_lightning.errors import InvalidValueError

Side = Literal["a", "b"]
"""Which factor of a LoRA layer: `a` is A, the down-projection; `b` is B, the up-projection."""


@dataclass(frozen=True, eq=False)
class LoraSite:
    """One adapted layer of the model, seen through its active adapter.

    Attributes:
        name: Name of the adapted module inside the PEFT model, e.g. `base_model.model.model.layers.0.self_attn.q_proj`.
        down: PEFT's `lora_A` module, weight `[r, d_in]`. Its output is the rank-space activation `[.., r]`.
        up: PEFT's `lora_B` module, weight `[d_out, r]`.
        base: The frozen layer that is adapted.
        scaling: Factor in front of the adapter's output: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA.
    """

    name: str
    down: nn.Linear
    up: nn.Linear
    base: nn.Module
    scaling: float

    @property
    def r(self) -> int:
        """Allocated rank: rows of A, columns of B."""
        return int(self.down.weight.shape[0])

    @property
    def kind(self) -> str:
        """Last part of the module's name: `q_proj`, `down_proj`, `c_attn` …."""
        return self.name.rpartition(".")[2]

    @property
    def parameters_per_rank(self) -> int:
        """Adapter parameters that one unit of rank costs: d_in + d_out."""
        return int(self.down.weight.shape[1] + self.up.weight.shape[0])


def require_lora(adapter: PeftConfig) -> None:
    """Check that an adapter's method has the layers that the geometry follows, from its configuration alone.

    Raises:
        ValueError: If it has not.
    """
    if adapter.peft_type != PeftType.LORA:
        raise InvalidValueError(
            f"model.geometry: expected null, as it follows plain LoRA layers and model.adapter is a {type(adapter).__name__}, "
            "got a GeometryConfig. Set it to null to train this adapter without geometry, or use a LoraConfig."
        )


def used_ranks(sites: Iterable[LoraSite]) -> list[int]:
    """Return, for each layer, the number of columns of B up to the last one that is not zero; one transfer for all.

    On the meta device, where there are no numbers, all r columns count.
    """
    sites = list(sites)
    if any(site.up.weight.is_meta for site in sites):
        return [site.r for site in sites]
    columns = [(site.up.weight.detach() != 0).any(dim=0) for site in sites]
    ranks = [(used * torch.arange(1, len(used) + 1, device=used.device)).amax() for used in columns]
    return [int(rank) for rank in torch.stack(ranks).tolist()]


def find_lora_sites(model: nn.Module) -> list[LoraSite]:
    """List every linear layer that the active LoRA adapter of `model` adapts, in module order.

    Works for whatever base layer PEFT wraps (`nn.Linear`, bitsandbytes 4-bit, GPT-2's `Conv1D`), since only the two
    factors matter. A module that is registered under several names (tied modules) is one site under its first name.

    Args:
        model: A PEFT model, or any module that contains PEFT LoRA layers.

    Raises:
        ValueError: If the active adapter has no LoRA layer, several adapters are active at once, or a layer has a
            variant for which the rank-space statistics are not those of a plain `B(A x)` (DoRA, embeddings,
            convolutions).
    """
    sites = list(_iterate_sites(model))
    if not sites:
        found = type(model.active_peft_config).__name__ if isinstance(model, PeftModel) else type(model).__name__
        raise InvalidValueError(
            f"adapter: expected one with LoRA layers for the geometry to follow, got {found}, which has none. "
            "Use a peft.LoraConfig as `adapter`, or set `geometry: null` to train this adapter without geometry."
        )
    return sites


def _iterate_sites(model: nn.Module) -> Iterator[LoraSite]:
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
        embedded = [adapter for adapter in module.active_adapters if adapter in module.lora_embedding_A]
        if not active and not embedded:
            continue
        if len(active) > 1:
            raise InvalidValueError(
                f"Layer '{name}': expected one active adapter for the geometry to follow, got {len(active)}: {active}. "
                "Call model.set_adapter(...) with the adapter to train."
            )
        down = module.lora_A[active[0]] if active else None
        if not isinstance(down, nn.Linear) or active[0] in module.lora_variant:
            variant = (
                type(module.lora_variant[active[0]]).__name__ if active and active[0] in module.lora_variant else ""
            )
            found = f"{type(module).__name__} {variant}".rstrip()
            raise InvalidValueError(
                f"Layer '{name}': expected a plain linear LoRA layer, got {found}. "
                "Remove it from `adapter.target_modules`, switch its variant off (use_dora …), or set `geometry: null`."
            )
        yield LoraSite(name, down, module.lora_B[active[0]], module.get_base_layer(), float(module.scaling[active[0]]))


def count_trainable(model: nn.Module) -> int:
    """Count the parameters that receive gradients; works on the meta device, without any weights."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
