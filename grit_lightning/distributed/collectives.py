"""What processes tell each other beside what the strategy does: sums, averages and copies, each one coalesced collective.

Without a process group, or alone in one, every function leaves its arguments as they are and communicates nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_LOW_BITS = 12  # of a count; the sums of both halves then stay below 2²⁴, where float32 still counts exactly


def process_count() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this is the process of rank zero, or the only one."""
    return process_count() == 1 or dist.get_rank() == 0


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all processes, in place and in one all-reduce; a collective.

    All processes end with the same bits. Counts travel as two float32 halves each, exact up to 2³⁶ in the sum and up to
    4,096 processes, so that they need no collective of their own.

    Args:
        tensors: float32 values and non-negative int64 counts, on one device, in the same order on every process.
    """
    if process_count() == 1 or not tensors:
        return
    parts = [part.flatten() for tensor in tensors for part in _as_float(tensor)]
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    sums = iter(flat.split([part.numel() for part in parts]))
    for tensor in tensors:
        if tensor.dtype == torch.int64:
            high, low = next(sums).long(), next(sums).long()
            tensor.copy_(((high << _LOW_BITS) + low).view_as(tensor))
        else:
            tensor.copy_(next(sums).view_as(tensor))


def _as_float(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.dtype != torch.int64:
        return (tensor,)
    return (tensor >> _LOW_BITS).float(), (tensor & ((1 << _LOW_BITS) - 1)).float()


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their means over all processes, in one all-reduce a dtype and device; a collective.

    Where a parameter took part in the loss of some processes only, the others count as zero, as under DDP; where it took
    part in none, it keeps no gradient.

    Args:
        parameters: The same ones in the same order on every process.
    """
    if process_count() == 1:
        return
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        buckets.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for members in buckets.values():
        here = [float(p.grad is not None) for p in members]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
        flags = torch.tensor(here, dtype=members[0].dtype, device=members[0].device)
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), flags])
        dist.all_reduce(flat)
        flat /= process_count()
        means = flat[: -len(members)].split([p.numel() for p in members])
        anywhere = [True] * len(members) if all(here) else (flat[-len(members) :] > 0).tolist()
        for parameter, mean, known in zip(members, means, anywhere, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(mean.view_as(parameter))
            elif known:
                parameter.grad = mean.view_as(parameter).clone()


@torch.no_grad()
def copy_from_first_process(tensors: Iterable[Tensor]) -> None:
    """Give every process the values that rank zero has, in one broadcast a dtype and device; a collective."""
    if process_count() == 1:
        return
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        buckets.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for members in buckets.values():
        flat = torch.cat([tensor.flatten() for tensor in members])
        dist.broadcast(flat, 0)
        for tensor, value in zip(members, flat.split([tensor.numel() for tensor in members]), strict=True):
            tensor.copy_(value.view_as(tensor))


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, by rank, on every process; a collective. They are pickled on their way."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values
