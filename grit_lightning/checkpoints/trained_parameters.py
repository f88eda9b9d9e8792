"""The parameters that a checkpoint holds: the trained ones, whole, and never the frozen backbone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grit_lightning.distributed.strategies import SUPPORTED
from grit_lightning.errors import InvalidValueError

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What sharding, recomputing and compiling put into the names of parameters."""


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a module, by their names on a single process."""
    return {_plain_name(name): parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def trained_state(module: nn.Module, prefix: str = "", keep_vars: bool = False) -> dict[str, Tensor]:
    """Return what a module's `state_dict` should hold: the trained parameters and nothing of the frozen backbone.

    Args:
        module: The module.
        prefix: Put before every name, as in torch.
        keep_vars: Leave the values attached to the graph, as in torch.

    Raises:
        ValueError: If a parameter is only a shard, which would be mistaken for the whole.
    """
    trained = trained_parameters(module)
    for name, parameter in trained.items():
        factor = (".lora_A." in name or ".lora_B." in name) and not name.endswith(".bias")  # of lora_bias
        if isinstance(parameter, DTensor) or parameter.numel() == 0 or (factor and parameter.ndim < 2):
            raise InvalidValueError(
                f"trainer.strategy: expected one that keeps the adapter whole, got a shard of {name} on this process, a "
                f"{type(parameter).__name__} of shape {tuple(parameter.shape)}. Set it to one of {', '.join(SUPPORTED)}."
            )
    return {prefix + name: parameter if keep_vars else parameter.detach() for name, parameter in trained.items()}


@torch.no_grad()
def load_trained_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state into the trained parameters; the backbone keeps its own.

    Args:
        module: The module.
        state: From `trained_state`.

    Raises:
        ValueError: If the parameters are not exactly those of this adapter.
    """
    trained = trained_parameters(module)
    require_same_parameters(trained, state)
    for name, parameter in trained.items():
        parameter.copy_(state[name])


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


def _plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
