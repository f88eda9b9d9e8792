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
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor
from transformers import PreTrainedModel

from grit_lightning.backbones.loading import load_backbone
from grit_lightning.errors import InvalidValueError, MissingFileError
from grit_lightning.export.adapter import export_adapter
from grit_lightning.export.peft_names import named_by_peft

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
        backbone: What the adapter was trained on, as in `load_backbone`, or a loaded model; None for what the adapter names.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: It is no LoRA, names no backbone, or does not fit the backbone.
    """
    if isinstance(source, PeftModel):
        name = str(source.active_peft_config.base_model_name_or_path or "")
        yield OpenAdapter(
            source, copy.deepcopy(source.active_peft_config), named_by_peft(source), "a model in memory", name
        )
        return
    path = Path(source).expanduser()
    if path.is_dir():
        yield _from_folder(path, backbone, str(path))
    elif path.is_file():
        with tempfile.TemporaryDirectory(prefix="grit-adapter-") as scratch:
            folder = Path(scratch) / "adapter"
            export_adapter(path, folder)
            yield _from_folder(folder, backbone, str(path))
    else:
        raise MissingFileError(
            f"--adapter: expected the folder of a PEFT adapter or a checkpoint, got {path}, which "
            "does not exist. Choose another."
        )


def _from_folder(folder: Path, backbone: str | PreTrainedModel | None, origin: str) -> OpenAdapter:
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
    if unknown := sorted(named_by_peft(model).keys() ^ tensors.keys()):
        raise InvalidValueError(
            f"--backbone: expected the model that {origin} was trained on, got {_name(name)}, with other layers: "
            f"{unknown[0]} and {len(unknown) - 1} more are on one side only. Set the right one."
        )
    return OpenAdapter(model.eval(), config, tensors, origin, _name(name))


def _name(backbone: str | PreTrainedModel) -> str:
    return str(backbone.config._name_or_path) if isinstance(backbone, PreTrainedModel) else str(backbone)
