"""Backbones without weights: their shapes alone, on the meta device, where nothing is read and nothing computed."""

from __future__ import annotations

import copy
import os

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from grit_lightning.backbones.loading import DTYPES, as_backbone, fast_dtype, require_kernel, resolve_options
from grit_lightning.backbones.reading import read_configuration


def empty_backbone(
    source: str | os.PathLike[str] | PreTrainedModel,
    *,
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
    gradient_checkpointing: bool = False,
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Build the model that `load_backbone` would return on the meta device, without reading a weight.

    Args:
        source: As for `load_backbone`. An instance is left as it is, and copied without its weights.
        dtype: As for `load_backbone`, or a dtype of torch.
        quantization: As for `load_backbone`; weights that would be quantised as they are read have their full shape here.
        gradient_checkpointing: As for `load_backbone`.
        attn_implementation: As for `load_backbone`.
        revision: As for `load_backbone`.

    Raises:
        ValueError: As for `load_backbone`.
    """
    named = dtype if isinstance(dtype, str) else "auto"
    resolved = resolve_options(source, named, quantization, revision)
    require_kernel(attn_implementation)
    if resolved.kind == "instance":
        return as_backbone(_without_weights(resolved.model), gradient_checkpointing)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    config = read_configuration(resolved, revision)
    chosen = dtype if isinstance(dtype, torch.dtype) else DTYPES[named] or config.dtype or fast_dtype()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=False, **options)
    return as_backbone(model, gradient_checkpointing)


def wants_shapes_only() -> bool:
    """Say whether whoever calls wants modules without values: under `torch.device("meta")`, or Lightning's `empty_init`.

    `empty_init` leaves memory as it is instead of initialising it. That is meant for weights that a checkpoint overwrites;
    an adapter would start from whatever the memory held.
    """
    probe = nn.init.constant_(torch.full((1,), torch.nan), 0.0)
    return probe.is_meta or bool(probe.isnan())


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model in memory, with what was done to its modules, but with tensors of shape and dtype only."""
    tensors = [*model.parameters(), *model.buffers()]
    empty = {id(tensor): tensor.detach().to("meta") for tensor in tensors}
    for tensor in tensors:
        if type(tensor) is nn.Parameter:
            empty[id(tensor)] = nn.Parameter(empty[id(tensor)], tensor.requires_grad)
    return copy.deepcopy(model, empty)
