"""What processes exchange in addition to what the strategy does: sums, averages, copies and small objects.

Without a process group, or alone in one, every function leaves its arguments as they are and communicates nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def process_count() -> int:
    """Return the number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_process() -> bool:
    """Return whether this is the process of rank zero, or the only one."""
    return process_count() == 1 or dist.get_rank() == 0


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all processes, in place; a collective.

    One all-reduce for values and, if there are any, one for counts. All processes end with the same bits.

    Args:
        tensors: float32 values and int64 counts on one device, in the same order on every process.
    """
    if process_count() == 1:
        return
    values = [tensor for tensor in tensors if tensor.is_floating_point()]
    counts = [tensor for tensor in tensors if not tensor.is_floating_point()]
    for members in (values, counts):
        if members:
            flat = torch.cat([tensor.flatten() for tensor in members])
            dist.all_reduce(flat)
            _copy_back(flat, members)


def largest_of_processes(value: int, device: torch.device) -> int:
    """Return the largest of the numbers that all processes pass; a collective of 8 bytes.

    Args:
        value: A number.
        device: Of the process group's backend.
    """
    if process_count() == 1:
        return value
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their means over all processes, in one all-reduce for each dtype and device; a collective.

    A missing gradient counts as zero, as under DDP, unless it is missing on every process: then it stays missing.

    Args:
        parameters: The same parameters in the same order on every process.
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
    """Overwrite tensors with the values of rank zero, in one broadcast for each dtype and device; a collective."""
    if process_count() == 1:
        return
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        buckets.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for members in buckets.values():
        flat = torch.cat([tensor.flatten() for tensor in members])
        dist.broadcast(flat, 0)
        _copy_back(flat, members)


def gather_objects(value: Any) -> list[Any]:
    """Return the values that all processes pass, ordered by rank; a collective.

    Args:
        value: Any object that can be pickled; keep it small.
    """
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def _copy_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write the parts of a flattened concatenation into the tensors that it was made of."""
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
