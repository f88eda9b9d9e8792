"""Turn a trained checkpoint into files that plain PEFT or transformers load: a compacted adapter, or a merged model."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from peft import PeftConfig, get_peft_config, set_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from grit_lightning.backbones.adapters import attach_adapter
from grit_lightning.backbones.loading import load_backbone, load_tokenizer
from grit_lightning.backbones.sources import BackboneSource, resolve_source
from grit_lightning.checkpoints.reading import CHECKPOINT_KEY, read_checkpoint, require_format
from grit_lightning.errors import InvalidValueError
from grit_lightning.export.card import RunNotes, card
from grit_lightning.export.compaction import CompactAdapter, compact
from grit_lightning.module import GritLitModule
from grit_lightning.runs.atomic import atomic_folder, require_free_folder

_MODEL_PREFIX = "model."  # GritLitModule.model
_LOADING = ("dtype", "quantization", "revision")  # a kernel or checkpointing of activations does not matter here


def export_adapter(
    source: GritLitModule | str | os.PathLike[str],
    output: str | os.PathLike[str],
    merge: bool = False,
    keep_empty: bool = False,
) -> CompactAdapter:
    """Write a trained adapter at its effective ranks, or the backbone with it merged in, and a README.md.

    The folder appears whole or not at all. Exporting the adapter of a checkpoint does not need the backbone.

    Args:
        source: Path of a checkpoint, or a module that has been trained; the module is left as it is.
        output: Folder to make; an existing one must be empty.
        merge: Write the full model and its tokenizer instead of the adapter, in the dtype of the backbone. A quantised
            backbone is de-quantised first.
        keep_empty: Keep layers whose B is zero at rank 1 instead of leaving them out of the adapter.

    Returns:
        The adapter as written.

    Raises:
        FileNotFoundError: There is no such checkpoint, or no backbone to merge into.
        FileExistsError: `output` is not empty.
        NotADirectoryError: `output` is a file.
        OSError: `output` cannot be written, or the backbone cannot be read.
        ValueError: The checkpoint cannot be read, is not one of GRIT, was never trained, or its adapter cannot be compacted.
        RuntimeError: The module's model is not built yet.
    """
    folder = require_free_folder(Path(output))
    trained = _from_module(source) if isinstance(source, GritLitModule) else _from_checkpoint(Path(source))
    adapter = compact(trained.config, trained.parameters, trained.ranks, keep_empty=keep_empty)
    backbone = _locate(trained.backbone)
    adapter.config.base_model_name_or_path = backbone.location or None
    adapter.config.revision = trained.loading.get("revision")
    with atomic_folder(folder) as unfinished:
        if merge:
            _write_merged(source, trained, adapter, unfinished)
        else:
            # not save_file, whose files only their owner may read
            content = save(adapter.tensors, metadata={"format": "pt"})
            (unfinished / "adapter_model.safetensors").write_bytes(content)
            adapter.config.save_pretrained(str(unfinished))
        text = card(adapter, folder.name, backbone, trained.loading, trained.notes, trained.steps, merged=merge)
        (unfinished / "README.md").write_text(text, encoding="utf-8")
    return adapter


# What was trained.


@dataclass(frozen=True)
class _Trained:
    """Everything that an export needs to know; `parameters` by name inside the PeftModel."""

    config: PeftConfig
    parameters: Mapping[str, Tensor]
    ranks: Mapping[str, int] | None
    backbone: str
    loading: Mapping[str, Any]
    steps: int | None = None
    notes: RunNotes = field(default_factory=RunNotes)


def _from_module(module: GritLitModule) -> _Trained:
    named = module.peft_model.named_parameters()
    return _Trained(
        config=module.adapter_config,
        parameters={name: parameter.detach() for name, parameter in named if parameter.requires_grad},
        ranks=None if module.geometry is None else module.geometry.ranks,
        backbone=module.hparams["backbone"],
        loading=dict(module.hparams),
    )


def _from_checkpoint(path: Path) -> _Trained:
    content = read_checkpoint(path)
    saved = content.get(CHECKPOINT_KEY)
    settings = content.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY) or {}
    if saved is None or "adapter" not in settings:
        raise InvalidValueError(
            f"{path}: expected a checkpoint of GritLitModule, got a file with {sorted(map(str, content))}. Take another one."
        )
    require_format(saved["format_version"], str(path))
    if content["global_step"] == 0:
        raise InvalidValueError(
            f"{path}: expected a trained adapter, got one of optimizer step 0. Export a checkpoint of a later step."
        )
    state = content["state_dict"].items()
    return _Trained(
        config=get_peft_config(dict(settings["adapter"])),
        parameters={name.removeprefix(_MODEL_PREFIX): value for name, value in state},
        ranks=saved["ranks"],
        backbone=settings["backbone"],
        loading=settings,
        steps=content["global_step"],
        notes=RunNotes.beside(path),
    )


def _locate(backbone: str) -> BackboneSource:
    """Return what PEFT and transformers can load: the hub id, or the folder that a local name stands for."""
    try:
        return resolve_source(backbone)
    except (OSError, ImportError, ValueError):  # not on this machine: whoever loads the adapter knows where theirs is
        return BackboneSource("folder", backbone)


# Merging.


def _write_merged(
    source: GritLitModule | str | os.PathLike[str], trained: _Trained, adapter: CompactAdapter, folder: Path
) -> None:
    if isinstance(source, GritLitModule):
        backbone = copy.deepcopy(source.peft_model).unload()
    elif trained.backbone:
        loading: dict[str, Any] = {name: trained.loading.get(name) for name in _LOADING}
        backbone = load_backbone(trained.backbone, **loading)
    else:
        raise InvalidValueError(
            "The checkpoint: expected the name of a backbone to merge into, got none, since the model was given in memory. "
            "Merge from the module: export_adapter(module, output, merge=True)."
        )
    merged = _merge(_as_dense(backbone), adapter)
    merged.config.use_cache = True  # training had switched it off
    merged.save_pretrained(folder)
    _write_tokenizer(trained, folder)


def _as_dense(backbone: PreTrainedModel) -> PreTrainedModel:
    """Return the backbone with ordinary weights and no trace of how they had been packed."""
    packing = getattr(backbone.config, "quantization_config", None)
    if packing is None:
        return backbone
    method = packing.get("quant_method") if isinstance(packing, Mapping) else packing.quant_method
    if str(getattr(method, "value", method)) != "gguf":
        return backbone.dequantize()
    del backbone.config.quantization_config  # unpacked when it was loaded; with this entry saving refuses
    return backbone


def _merge(backbone: PreTrainedModel, adapter: CompactAdapter) -> PreTrainedModel:
    """Merge with PEFT what PEFT would load from the exported adapter."""
    model = attach_adapter(backbone, adapter.config)
    result = set_peft_model_state_dict(model, adapter.tensors)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise InvalidValueError(
            f"The adapter: expected parameters that fit the backbone, got {[*missing, *result.unexpected_keys][:3]}, which do "
            "not. Merge into the backbone that it was trained on."
        )
    merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    return merged


def _write_tokenizer(trained: _Trained, folder: Path) -> None:
    name = trained.notes.tokenizer or trained.backbone
    try:
        tokenizer = load_tokenizer(name, None if trained.notes.tokenizer else trained.loading.get("revision"))
    except (OSError, ValueError) as error:
        warnings.warn(f"The merged model is written without a tokenizer: {error}", stacklevel=2)
        return
    tokenizer.save_pretrained(folder)
