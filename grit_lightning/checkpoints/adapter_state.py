"""What a checkpoint holds of the model: the whole adapter, trained or not, and never the frozen backbone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grit_lightning.distributed.strategies import SUPPORTED
from grit_lightning.errors import InvalidValueError

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What sharding, recomputing and compiling put into the names of parameters."""


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a module, by their names on a single process."""
    return {plain_name(name): parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def adapter_names(module: nn.Module, backbone: Iterable[Tensor]) -> frozenset[str]:
    """Return the names of the tensors that a checkpoint has to hold: all but the backbone's, and what of it is trained.

    A part of an adapter may be frozen (A of LoRA-FA, the ranks of AdaLoRA, the projections of VeRA), and a part of the
    backbone trained (its biases).

    Args:
        module: The module, with the adapter attached and nothing wrapped yet.
        backbone: Parameters and buffers of the backbone, from before the adapter was attached.
    """
    frozen = {id(tensor) for tensor in backbone if not tensor.requires_grad}
    kept = nn.Module.state_dict(module, keep_vars=True).keys()  # all but buffers that are made anew
    named = chain(module.named_parameters(), module.named_buffers())
    return frozenset(plain_name(name) for name, tensor in named if name in kept and id(tensor) not in frozen)


def saved_tensors(module: nn.Module, names: frozenset[str]) -> dict[str, Tensor]:
    """Return the tensors of these names.

    Args:
        module: The module, however it is wrapped by now.
        names: From `adapter_names`.
    """
    named = chain(module.named_parameters(), module.named_buffers())
    return {plain: tensor for name, tensor in named if (plain := plain_name(name)) in names}


def saved_state(
    module: nn.Module, names: frozenset[str], prefix: str = "", keep_vars: bool = False
) -> dict[str, Tensor]:
    """Return what a module's `state_dict` should hold: the adapter, and nothing of the frozen backbone.

    Args:
        module: The module.
        names: From `adapter_names`.
        prefix: Put before every name, as in torch.
        keep_vars: Leave the values attached to the graph, as in torch.

    Raises:
        ValueError: If a parameter is only a shard, which would be mistaken for the whole.
    """
    saved = saved_tensors(module, names)
    for name, parameter in saved.items():
        factor = (".lora_A." in name or ".lora_B." in name) and not name.endswith(".bias")
        if isinstance(parameter, DTensor) or parameter.numel() == 0 or (factor and parameter.ndim < 2):
            raise InvalidValueError(
                f"trainer.strategy: expected one that keeps the adapter whole, got a shard of {name} on this process, a "
                f"{type(parameter).__name__} of shape {tuple(parameter.shape)}. Set it to one of {', '.join(SUPPORTED)}."
            )
    return {prefix + name: parameter if keep_vars else parameter.detach() for name, parameter in saved.items()}


@torch.no_grad()
def load_saved_state(module: nn.Module, names: frozenset[str], state: Mapping[str, Tensor]) -> None:
    """Copy a state into the adapter; the backbone keeps its own.

    Args:
        module: The module.
        names: From `adapter_names`.
        state: From `saved_state`.

    Raises:
        ValueError: If the tensors are not exactly those of this adapter.
    """
    saved = saved_tensors(module, names)
    require_same_parameters(saved, state)
    for name, parameter in saved.items():
        parameter.copy_(state[name])


def require_separate(tensors: Mapping[str, Tensor]) -> None:
    """Check that no tensor of an adapter, just attached, is a view of another.

    Views come apart when the model is moved to another device, and are joined again when it is built anew: a checkpoint of two
    tensors would be loaded into one.

    Raises:
        ValueError: If one is.
    """
    owners: dict[int, str] = {}
    for name, tensor in tensors.items():
        place = 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
        if place and (other := owners.setdefault(place, name)) != name:
            raise InvalidValueError(
                f"adapter.ensure_weight_tying: expected false where layers are adapted, got true, which makes {name} a view of "
                f"{other} until the model is moved to another device. Set it to false, or name the embeddings in "
                "adapter.modules_to_save."
            )


def require_same_parameters(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint has exactly the parameters of this adapter, by name and shape.

    Raises:
        ValueError: If it does not.
    """
    here, there = ({(name, tuple(value.shape)) for name, value in side.items()} for side in (expected, found))
    if here != there:
        different = sorted(here ^ there)
        raise InvalidValueError(
            f"Checkpoint: expected the adapter parameters of this model, got others: {len(different)} differ, first "
            f"{different[:2]}. Set model.backbone and model.adapter to what the checkpoint was trained with."
        )


def expect_no_backbone(module: nn.Module, incompatible: Any, saved: Collection[str] | None = None) -> None:
    """Take the backbone, which no state holds, off the list of what the state of a module or of its parent lacks.

    Args:
        module: The module.
        incompatible: torch's incompatible keys, as its hooks after loading get them; the list of missing ones is changed.
        saved: Names that it expects to find, from `adapter_names`; None for those of its `state_dict`.
    """
    everything = nn.Module.state_dict(module).keys()
    expected = module.state_dict() if saved is None else [name for name in everything if plain_name(name) in saved]
    backbone = everything - set(expected)
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not _ends_in(name, backbone)]


def _ends_in(name: str, names: Collection[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def plain_name(name: str) -> str:
    """Return the name of a tensor without what sharding, recomputing and compiling have put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
