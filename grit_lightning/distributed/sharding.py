"""Shards the frozen backbone unit by unit, so that only the process that reads it ever holds all of it.

A unit is one block of the network (a decoder layer), or everything outside the blocks. The adapter is not sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grit_lightning.errors import InvalidValueError

Wrap = Callable[[nn.Module], nn.Module]


def block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """Return the lists of repeated blocks of a network, whatever their class: every `ModuleList` that is not inside another.

    Lists inside a block (of experts, for example) belong to the block. A vision tower or an encoder has its own list.

    Raises:
        ValueError: If there is none.
    """

    def outermost(module: nn.Module) -> Iterator[nn.ModuleList]:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                yield child
            else:
                yield from outermost(child)

    found = [blocks for blocks in outermost(model) if len(blocks) > 0]
    if not found:
        raise InvalidValueError(
            "trainer.strategy: expected a model with a list of repeated blocks (a ModuleList) to shard, got a "
            f"{type(model).__name__}, which has none. Set trainer.strategy to ddp."
        )
    return found


def shard_in_units(model: nn.Module, wrap: Wrap, device: torch.device, *, fill: bool) -> None:
    """Replace every block of a model by its sharded form; the caller then shards the rest.

    Args:
        model: Its parameters may be on any device; those on the meta device are materialized one unit at a time.
        wrap: Shards a block and returns its replacement.
        device: Where to materialize.
        fill: Broadcast the values of rank zero to every process; a collective. Needed if some process has meta parameters.
    """
    lists = block_lists(model)
    inside = {id(module) for blocks in lists for module in blocks.modules()} - {id(blocks) for blocks in lists}
    outside = [module for module in model.modules() if id(module) not in inside]
    _prepare(outside, device, fill)
    for blocks in lists:
        for index, block in enumerate(blocks):
            _prepare(list(block.modules()), device, fill)
            blocks[index] = wrap(block)


@torch.no_grad()
def _prepare(modules: list[nn.Module], device: torch.device, fill: bool) -> None:
    materialize(modules, device)
    if not fill:
        return
    seen: set[int] = set()
    for tensor in chain.from_iterable(_own_tensors(module) for module in modules):
        if tensor.requires_grad or id(tensor) in seen:  # `share_adapter` sends the adapter; tied weights are sent once
            continue
        seen.add(id(tensor))
        value = tensor.detach().to(device).contiguous()
        dist.broadcast(value, 0)
        tensor.data = value


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def materialize(modules: list[nn.Module], device: torch.device) -> None:
    """Replace tensors on the meta device by uninitialised ones on `device`; tied tensors stay tied."""
    made: dict[int, Tensor] = {}
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device=device)
                real = made.setdefault(id(parameter), nn.Parameter(empty, parameter.requires_grad))
                module.register_parameter(name, real)  # type: ignore[arg-type]  # setdefault widens it
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if buffer.is_meta:
                persistent = name not in module._non_persistent_buffers_set
                real = made.setdefault(id(buffer), torch.empty_like(buffer, device=device))
                module.register_buffer(name, real, persistent)
