"""Starts that move a part of the backbone into the adapter: W' = W − s·B₀A₀ and s·B₀A₀ (PiSSA, OLoRA …).

A trained adapter of this kind fits the moved backbone W' only. Two things keep it usable. The start is repeatable: what it
draws does not depend on the state of the random number generators, so that a resumed run moves the backbone to the same
place. And A₀ and B₀ are kept: W' + s·BA = W + s·(BA − B₀A₀) is a plain LoRA of rank 2r on the backbone as everybody has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from grit_lightning.errors import InvalidValueError

MOVING = ("pissa", "olora")
"""First letters of the values of `init_lora_weights` that subtract s·B₀A₀ from the backbone."""
TOLERANCE = 1e-3
"""Largest relative difference of B₀A₀ that is taken for rounding: another processor computes another last digit."""

Places = dict[str, tuple[int, int]]


def moves_backbone(adapter: PeftConfig) -> bool:
    """Return whether the adapter starts by subtracting s·B₀A₀ from the backbone."""
    start = getattr(adapter, "init_lora_weights", None)
    return isinstance(start, str) and start.lower().startswith(MOVING)


@contextmanager
def repeatable_start(adapter: PeftConfig, backbone: nn.Module) -> Iterator[None]:
    """Give a start that moves the backbone the same random numbers at all times; leave other adapters theirs.

    Raises:
        ValueError: If it would move packed weights, whose bits are no numbers.
    """
    if not moves_backbone(adapter):
        yield
        return
    if any(hasattr(weight, "quant_state") for weight in backbone.parameters()):
        raise InvalidValueError(
            "adapter.init_lora_weights: expected one that leaves the backbone as it is, as its weights are quantised, got "
            f"{getattr(adapter, 'init_lora_weights', None)!r}. Set it to true, or set model.quantization to null."
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def places(backbone: nn.Module) -> Places:
    """Return where the weights of a backbone are in memory and how often they were changed, to notice that they moved."""
    return {_plain(name): (p.data_ptr(), p._version) for name, p in backbone.named_parameters() if not p.is_meta}


def start_of(model: PeftModel, adapter: PeftConfig, before: Places) -> dict[str, Tensor]:
    """Return A₀ and B₀ of a start that moved the backbone, by name in the model; nothing for other starts.

    Args:
        model: The model, its adapter just attached.
        adapter: Its configuration.
        before: `places` of the backbone before that.

    Raises:
        ValueError: If the backbone was changed in a way that cannot be undone.
    """
    if moves_backbone(adapter):
        _require_unshared(model, adapter)
        named = model.named_parameters()
        return {name: p.detach().cpu().clone() for name, p in named if ".lora_A." in name or ".lora_B." in name}
    after = places(model.get_base_model())
    if changed := sorted(name for name, place in before.items() if after.get(name, place) != place):
        raise InvalidValueError(
            "adapter.init_lora_weights: expected one that leaves the backbone as it is, or moves a part of it into A and B "
            f"(pissa, olora), got {getattr(adapter, 'init_lora_weights', None)!r}, which replaces {changed[0]} and "
            f"{len(changed) - 1} other weights: no checkpoint or export could give the trained model back. Set it to another."
        )
    return {}


def _require_unshared(model: PeftModel, adapter: PeftConfig) -> None:
    """Refuse to have moved weights that another layer uses without the adapter."""
    owners = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    for name, layer in model.named_modules():
        weight = getattr(layer.get_base_layer(), "weight", None) if isinstance(layer, BaseTunerLayer) else None
        if owners[id(weight)] > 1:
            raise InvalidValueError(
                f"adapter.init_lora_weights: expected one that leaves the weights of {name} where they are, which it shares "
                f"with another layer, got {getattr(adapter, 'init_lora_weights', None)!r}. Set it to true, or take that layer "
                "out of adapter.target_modules."
            )


def require_start(saved: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint's adapter started from where this one did, so that both fit the same moved backbone.

    Args:
        saved: `start_of` the model that was trained.
        here: `start_of` this model.

    Raises:
        ValueError: If it did not.
    """
    if saved.keys() != here.keys():
        raise InvalidValueError(
            "Checkpoint: expected an adapter that starts as this one does, got one whose start moved "
            f"{len(saved) // 2} layers of the backbone, not {len(here) // 2}. Set model.adapter to what it was trained with."
        )
    for name in saved:
        if ".lora_A." not in name:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        there, now = (side[other].double() @ side[name].double() for side in (saved, here))
        if not torch.allclose(there, now, rtol=0.0, atol=TOLERANCE * float(there.abs().max())):
            raise InvalidValueError(
                "adapter.init_lora_weights: expected the start that the checkpoint was trained from, got another one in "
                f"{name.partition('.lora_A.')[0]}: this version of torch or PEFT splits the backbone differently. Resume "
                "where it was trained, or export it (grit export) and train on from that."
            )


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")
