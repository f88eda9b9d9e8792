"""Reading checkpoint files without running code in them, and what they say about the model that they belong to."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from peft import PEFT_TYPE_TO_CONFIG_MAPPING

CHECKPOINT_KEY = "grit"
"""Where our entry stands in a checkpoint, beside Lightning's own."""
CHECKPOINT_FORMAT = 4
"""Version of that entry; raised whenever an older one can no longer be read."""

# Written by PEFT about the file, or filled in by it when the adapter is attached: not settings.
NOT_SETTINGS = ("peft_type", "auto_mapping", "peft_version", "loftq_config")


def read_checkpoint(checkpoint: Path, *, map_location: Any = "cpu", mmap: bool = True) -> dict[str, Any]:
    """Return the content of a checkpoint.

    Args:
        checkpoint: Path of a Lightning checkpoint. It is read with `weights_only`, so no code in it can run.
        map_location: Where its tensors go, as in `torch.load`.
        mmap: Leave tensors on disk until they are used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or no checkpoint.
    """
    if not checkpoint.is_file():
        what = "is a folder, expected a checkpoint file" if checkpoint.is_dir() else "does not exist"
        raise FileNotFoundError(f"The checkpoint {checkpoint} {what}. Set ckpt_path to a file.")
    try:
        content = torch.load(checkpoint, map_location=map_location, weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{checkpoint} cannot be read as a checkpoint, it is damaged or cut off: {error}. Take an earlier one."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{checkpoint} is no checkpoint: expected a dict, but it holds a {type(content).__name__}.")
    return content


def grit_entry(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return our entry of a checkpoint's content.

    Raises:
        ValueError: If there is none, or it is of another format version.
    """
    entry: dict[str, Any] | None = content.get(CHECKPOINT_KEY)
    if entry is None:
        raise ValueError(
            f"Expected a checkpoint of a GritLitModule, got one without the entry {CHECKPOINT_KEY!r}. Set ckpt_path to one "
            "that this program has written."
        )
    require_format(entry["format_version"])
    return entry


def require_format(version: int, name: str = "The checkpoint") -> None:
    """Check that a checkpoint is of the format version that this release writes.

    Args:
        version: Its `format_version`.
        name: What to call it in the message.

    Raises:
        ValueError: If it is of another one.
    """
    if version != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{name} has format version {version}, expected {CHECKPOINT_FORMAT}. Resume it with the release of grit-lightning "
            "that wrote it, or export it there (grit export --merge) and train on with model.backbone set to the result."
        )


def model_settings(checkpoint: Path) -> dict[str, Any]:
    """Return the arguments of `GritLitModule` that a checkpoint was trained with, as command line and YAML write them.

    Args:
        checkpoint: Path of a Lightning checkpoint.

    Raises:
        ValueError: If it cannot be read, or does not hold the hyperparameters of a `GritLitModule`.
    """
    content = read_checkpoint(checkpoint)
    saved = dict(content.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    if "adapter" not in saved or "backbone" not in saved:
        raise ValueError(
            f"{checkpoint} is no checkpoint of GritLitModule: expected the hyperparameters adapter and backbone among others, "
            f"got {sorted(saved)}."
        )
    adapter = dict(saved.pop("adapter"))
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[adapter["peft_type"]]
    init_args = {name: value for name, value in adapter.items() if name not in NOT_SETTINGS}
    return saved | {"adapter": {"class_path": f"peft.{config_class.__name__}", "init_args": init_args}}
