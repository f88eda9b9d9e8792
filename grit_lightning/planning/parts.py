"""Memory of one process by part, and what becomes of it on other devices or in other bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from grit_lightning.distributed.sharding import block_lists
from grit_lightning.errors import InvalidValueError
from grit_lightning.planning.rehearsal import bytes_of

NF4_BLOCK, SCALES_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one of their own (double quantisation), in bitsandbytes."""
_TABLES = 4 * (16 + 256 + 1)
"""Bytes of the tables that bitsandbytes keeps with each weight: 16 codes, 256 codes of scales and their mean, float32."""
GATHERED_BLOCKS = 2
"""Blocks that FSDP holds whole at once: the one that computes, and the next, which is on its way."""


@dataclass(frozen=True)
class Parts:
    """Bytes of one process.

    Attributes:
        weights: The frozen backbone.
        adapter: The adapter's parameters.
        optimizer: The optimizer's states; None where they are not known.
        statistics: The geometry.
        activations: What forward, backward and update hold at their peak: activations, logits, gradients.
        exchange: Buffers to average gradients between processes.
    """

    weights: int
    adapter: int
    optimizer: int | None
    statistics: int
    activations: int
    exchange: int = 0

    @property
    def total(self) -> int:
        """The sum of what is known."""
        return sum(size or 0 for size in asdict(self).values())


def data_parallel(parts: Parts, gradients: int) -> Parts:
    """Return the parts of each process under DDP: everything is whole, and gradients are copied into buckets.

    Args:
        parts: On one device.
        gradients: Bytes of the adapter's gradients.
    """
    return replace(parts, exchange=gradients)


def sharded(parts: Parts, backbone: PreTrainedModel, processes: int, gradients: int, nf4: bool) -> Parts:
    """Return the parts of each process under FSDP: a share of the backbone, and the units that are gathered to compute.

    What is outside of the blocks (embedding, head, last norm) stays gathered through a step; of the blocks, two are whole at
    once. The adapter's gradients are averaged in one flat copy when the activations are gone, so that they only show where
    they are larger.

    Args:
        parts: On one device.
        backbone: The backbone, without its adapter.
        processes: How many share the weights.
        gradients: Bytes of the adapter's gradients.
        nf4: Whether linear layers are packed.

    Raises:
        ValueError: If the backbone has no blocks.
    """
    packed = quantised_weights(backbone) if nf4 else {}
    blocks = [_stored(block.parameters(), packed) for blocks in block_lists(backbone) for block in blocks]
    everything = _stored(backbone.parameters(), packed)
    root, buffers = everything - sum(blocks), bytes_of(backbone.buffers())
    gathered = root + sum(sorted(blocks, reverse=True)[:GATHERED_BLOCKS])
    share = math.ceil(everything / processes) + gathered * (processes - 1) // processes
    return replace(parts, weights=share + buffers, activations=max(parts.activations, 2 * gradients))


def quantised_weights(backbone: PreTrainedModel) -> dict[int, int]:
    """Return the bytes that NF4 packs each weight of a backbone into, by the id of the weight; others stay as they are.

    Args:
        backbone: The backbone, without its adapter.
    """
    kept = set(get_keys_to_not_convert(backbone))
    layers = [
        module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in kept
    ]
    return {id(layer.weight): packed_bytes(layer.weight) for layer in layers}


def packed_bytes(weight: Tensor) -> int:
    """Return the bytes of a weight in NF4 with double quantisation, scales and tables included."""
    scales = math.ceil(weight.numel() / NF4_BLOCK)
    return math.ceil(weight.numel() / 2) + scales + 4 * math.ceil(scales / SCALES_BLOCK) + _TABLES


def weight_bytes(backbone: PreTrainedModel, nf4: bool) -> int:
    """Return the bytes of a backbone's parameters and buffers.

    Args:
        backbone: The backbone, without its adapter.
        nf4: Whether linear layers are packed.
    """
    packed = quantised_weights(backbone) if nf4 else {}
    return _stored(backbone.parameters(), packed) + bytes_of(backbone.buffers())


def unpacked_bytes(backbone: PreTrainedModel) -> int:
    """Return the bytes of the largest weight that NF4 packs, which is whole while its layer computes."""
    packed = quantised_weights(backbone)
    return max((weight.nbytes for weight in backbone.parameters() if id(weight) in packed), default=0)


def has_blocks(backbone: PreTrainedModel) -> bool:
    """Say whether a backbone has blocks to shard."""
    try:
        return bool(block_lists(backbone))
    except InvalidValueError:
        return False


def _stored(parameters: Iterable[nn.Parameter], packed: dict[int, int]) -> int:
    return sum(_sizes(parameters, packed))


def _sizes(parameters: Iterable[nn.Parameter], packed: dict[int, int]) -> Iterator[int]:
    seen: set[int] = set()
    for parameter in parameters:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield packed.get(id(parameter), parameter.nbytes)
