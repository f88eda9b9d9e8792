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
from peft import PeftConfig, PeftModel, get_peft_config
from safetensors.torch import save
from torch import Tensor

from grit_lightning.backbones.loading import load_backbone, load_tokenizer
from grit_lightning.backbones.sources import BackboneSource, resolve_source
from grit_lightning.checkpoints.reading import CHECKPOINT_KEY, read_checkpoint, require_format
from grit_lightning.errors import InvalidValueError
from grit_lightning.export.card import RunNotes, card
from grit_lightning.export.compaction import CompactAdapter, compact
from grit_lightning.export.merging import merge as merge_into
from grit_lightning.export.merging import require_mergeable
from grit_lightning.export.peft_names import named_by_peft, on_file
from grit_lightning.geometry_hooks import GeometryHooks
from grit_lightning.geometry_steps import GeometrySteps
from grit_lightning.module import GritLitModule
from grit_lightning.runs.atomic import atomic_folder, require_free_folder

_LOADING = ("dtype", "quantization", "revision")  # a kernel or checkpointing of activations does not matter here


Source = GritLitModule | GeometryHooks | GeometrySteps | str | os.PathLike[str]


def export_adapter(
    source: Source,
    output: str | os.PathLike[str],
    merge: bool = False,
    keep_empty: bool = False,
) -> CompactAdapter:
    """Write a trained adapter at its effective ranks, or the backbone with it merged in, and a README.md.

    An adapter that cannot be sliced, as PEFT has many kinds, is written whole, as PEFT would write it; the result and the
    README.md say why. The folder appears whole or not at all. Exporting the adapter of a checkpoint does not need the
    backbone's weights, and where there is nothing but LoRA's factors not even its configuration.

    Args:
        source: Path of a checkpoint, or a module that has been trained; the module is left as it is. For a module of your own
            its `GeometryHooks`, for a loop of your own its `GeometrySteps`.
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
        ValueError: The checkpoint cannot be read, is not one of GRIT, was never trained, or its adapter cannot be
            merged.
        RuntimeError: The module's model is not built yet.
    """
    folder = require_free_folder(Path(output))
    steps = _steps_of(source)
    trained = _from_steps(steps) if isinstance(steps, GeometrySteps) else _from_checkpoint(Path(steps))
    model = steps.model if isinstance(steps, GeometrySteps) else None
    adapter = compact(trained.config, trained.parameters, trained.ranks, trained.start, keep_empty=keep_empty)
    backbone = _locate(trained.backbone)
    adapter.config.base_model_name_or_path = backbone.location or None
    adapter.config.revision = trained.loading.get("revision")
    if merge:
        require_mergeable(trained.config)
    with atomic_folder(folder) as unfinished:
        if merge:
            _write_merged(model, trained, adapter, unfinished)
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
    """Everything that an export needs to know; tensors under PEFT's names on file."""

    config: PeftConfig
    parameters: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    ranks: Mapping[str, int] | None
    loading: Mapping[str, Any]
    """`backbone` and how it was loaded."""
    steps: int | None = None
    notes: RunNotes = field(default_factory=RunNotes)

    @property
    def backbone(self) -> str:
        return str(self.loading["backbone"])


def _steps_of(source: Source) -> GeometrySteps | str | os.PathLike[str]:
    """Return what holds the trained model; a path stays one."""
    hooks = source.hooks if isinstance(source, GritLitModule) else source
    return hooks.steps if isinstance(hooks, GeometryHooks) else hooks


def _from_steps(steps: GeometrySteps) -> _Trained:
    config, start = get_peft_config(dict(steps.packer.adapter)), steps.packer.start
    return _Trained(
        config=config,
        parameters=named_by_peft(steps.model),
        start=on_file(config, start, "") if start else {},
        ranks=None if steps.geometry is None else steps.geometry.ranks,
        loading=steps.origin.source,
    )


def _from_checkpoint(path: Path) -> _Trained:
    content = read_checkpoint(path)
    saved = content.get(CHECKPOINT_KEY)
    settings = content.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY) or {}
    if saved is None:
        raise InvalidValueError(
            f"{path}: expected a checkpoint of GritLitModule, or of a module that calls GeometryHooks, got a file with "
            f"{sorted(map(str, content))}. Take another one."
        )
    require_format(saved["format_version"], str(path))
    if content["global_step"] == 0:
        raise InvalidValueError(
            f"{path}: expected a trained adapter, got one of optimizer step 0. Export a checkpoint of a later step."
        )
    config, start = get_peft_config(dict(saved["adapter"])), saved.get("start") or {}
    loading = saved.get("model") or {"prefix": "model.", **settings}  # early checkpoints are all of GritLitModule
    prefix: str = loading["prefix"]
    state = {name.removeprefix(prefix): v for name, v in content["state_dict"].items() if name.startswith(prefix)}
    return _Trained(
        config=config,
        parameters=on_file(config, state, loading["backbone"], loading.get("revision")),
        start=on_file(config, start, "") if start else {},
        ranks=saved["ranks"],
        loading=loading,
        steps=content["global_step"],
        notes=RunNotes.beside(path),
    )


def _locate(backbone: str) -> BackboneSource:
    """Return what PEFT and transformers can load: the hub id, or the folder that a local name stands for."""
    try:
        return resolve_source(backbone)
    except (OSError, ImportError, ValueError):  # not on this machine: whoever loads the adapter knows where theirs is
        return BackboneSource("folder", backbone)


def _write_merged(model: PeftModel | None, trained: _Trained, adapter: CompactAdapter, folder: Path) -> None:
    if model is not None:
        backbone = copy.deepcopy(model).unload()
        adapter = compact(trained.config, trained.parameters)  # whose start is missing in this backbone already
    elif trained.backbone:
        loading: dict[str, Any] = {name: trained.loading.get(name) for name in _LOADING}
        backbone = load_backbone(trained.backbone, **loading)
    else:
        raise InvalidValueError(
            "The checkpoint: expected the name of a backbone to merge into, got none, since the model was given in memory. "
            "Merge from the module: export_adapter(module, output, merge=True), or from its GeometryHooks."
        )
    merge_into(backbone, adapter).save_pretrained(folder)
    _write_tokenizer(trained, folder)


def _write_tokenizer(trained: _Trained, folder: Path) -> None:
    name = trained.notes.tokenizer or trained.backbone
    try:
        tokenizer = load_tokenizer(name, None if trained.notes.tokenizer else trained.loading.get("revision"))
    except (OSError, ValueError) as error:
        warnings.warn(f"The merged model is written without a tokenizer: {error}", stacklevel=2)
        return
    tokenizer.save_pretrained(folder)
