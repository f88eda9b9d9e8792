"""Open an adapter that is to be edited: a PEFT folder, whoever trained it, a checkpoint of ours, or a model in memory."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor
from transformers import PreTrainedModel

from grit_lightning.backbones.loading import load_backbone
from grit_lightning.backbones.moved_start import MOVING
from grit_lightning.errors import InvalidValueError, MissingFileError
from grit_lightning.export.adapter import export_adapter
from grit_lightning.export.peft_names import named_by_peft

MOVING_STARTS = (*MOVING, "corda", "loftq", "lora_ga")
"""First letters of the values of `init_lora_weights` that change the backbone's weights."""

AdapterSource: TypeAlias = PeftModel | str | os.PathLike[str]


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter in its model, and as it is on file.

    Attributes:
        model: Backbone and adapter, in evaluation mode unless it was given in memory.
        config: The adapter's configuration.
        tensors: Its parameters under PEFT's names on file, in the dtype that they have there.
        origin: Where it came from, for the card.
        backbone: Where the backbone came from; empty for a model in memory without a name.
    """

    model: PeftModel
    config: PeftConfig
    tensors: Mapping[str, Tensor]
    origin: str
    backbone: str


@contextmanager
def opened_adapter(source: AdapterSource, backbone: str | PreTrainedModel | None = None) -> Iterator[OpenAdapter]:
    """Yield an adapter in its model.

    Args:
        source: A PEFT model; the folder of a PEFT adapter; or a checkpoint of a `GritLitModule`, which is read as
            `export_adapter` would write it.
        backbone: What the adapter was trained on, as in `load_backbone`, or a loaded model, which is given back without the
            adapter; None for what the adapter names.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: It is no LoRA, names no backbone, does not fit the backbone, or began by changing it.
    """
    if isinstance(source, PeftModel):
        if backbone is not None:
            raise InvalidValueError("backbone: expected none beside a model, which has its own, got one. Leave it out.")
        _require_unmoved(source.active_peft_config, "the model")
        name = str(source.active_peft_config.base_model_name_or_path or "")
        yield OpenAdapter(
            source, copy.deepcopy(source.active_peft_config), named_by_peft(source), "a model in memory", name
        )
        return
    path = Path(source).expanduser()
    if path.is_dir():
        with _from_folder(path, backbone, str(path)) as opened:
            yield opened
    elif path.is_file():
        with tempfile.TemporaryDirectory(prefix="grit-adapter-") as scratch:
            folder = Path(scratch) / "adapter"
            export_adapter(path, folder)
            with _from_folder(folder, backbone, str(path)) as opened:
                yield opened
    else:
        raise MissingFileError(
            f"--adapter: expected the folder of a PEFT adapter or a checkpoint, got {path}, which "
            "does not exist. Choose another."
        )


def _require_unmoved(config: Any, origin: str) -> None:
    """Check that an adapter leaves the backbone's own weights as they are, so that without it there is the backbone."""
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(MOVING_STARTS):
        raise InvalidValueError(
            f"--adapter: expected an adapter on a backbone that is as it was, got init_lora_weights {start!r} in {origin}, "
            "which moves a part of the backbone into the adapter. Convert it to a plain LoRA: save_pretrained of PEFT with "
            "path_initial_model_for_weight_conversion; for a run of GRIT, give the checkpoint."
        )


@contextmanager
def _from_folder(folder: Path, backbone: str | PreTrainedModel | None, origin: str) -> Iterator[OpenAdapter]:
    if not (folder / "adapter_config.json").is_file():
        raise MissingFileError(
            f"--adapter: expected the folder of a PEFT adapter, got {folder}, which has no adapter_config.json. Choose another."
        )
    config: Any = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != PeftType.LORA:
        raise InvalidValueError(
            f"--adapter: expected a LoRA adapter, got {config.peft_type.value} in {origin}. Only plain LoRA "
            "has the rank space that is edited."
        )
    _require_unmoved(config, origin)
    name = backbone if backbone is not None else config.base_model_name_or_path
    if not name:
        raise InvalidValueError(
            f"--backbone: expected the model that {origin} was trained on, got none, and its "
            "adapter_config.json names none. Set it."
        )
    base = (
        name
        if isinstance(name, PreTrainedModel)
        else load_backbone(name, dtype="auto", revision=None if backbone else config.revision)
    )
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise InvalidValueError(
            "backbone: expected a model without an adapter, got one with. Call unload() on it first."
        )
    tensors = load_peft_weights(str(folder), device="cpu")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # they are counted below
            model: Any = PeftModel.from_pretrained(base, str(folder))
    except (RuntimeError, ValueError) as error:
        raise InvalidValueError(
            f"--backbone: expected the model that {origin} was trained on, got {_name(name)}, which it does not fit: "
            f"{str(error).strip().splitlines()[0]} Set the right one."
        ) from error
    in_model, on_file = ({key for key in keys if ".lora_" in key} for keys in (named_by_peft(model), tensors))
    if unknown := sorted(in_model ^ on_file):
        others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InvalidValueError(
            f"--backbone: expected the model that {origin} was trained on, got {_name(name)}, with other layers: "
            f"{unknown[0]}{others} on one side only. Set the right one."
        )
    if isinstance(backbone, str):
        config.base_model_name_or_path, config.revision = backbone, None
    try:
        yield OpenAdapter(model.eval(), config, tensors, origin, _name(name))
    finally:
        if isinstance(backbone, PreTrainedModel):
            model.unload()


def _name(backbone: str | PreTrainedModel) -> str:
    return str(backbone.config._name_or_path) if isinstance(backbone, PreTrainedModel) else str(backbone)
