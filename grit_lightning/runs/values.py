"""Numbers on disk: valid JSON for any float, files that are whole or not there at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

JSONValue = str | int | float | bool | None | list["JSONValue"] | dict[str, "JSONValue"]


def jsonable(value: Any) -> JSONValue:
    """Turns numbers, one-element tensors and nested mappings or sequences of them into what JSON can hold.

    JSON has no NaN and no infinity, and a reader must be able to tell a run that diverged from one that measured
    nothing: non-finite numbers become the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which `float` reads
    back, and None stays null.

    Raises:
        TypeError: A value is none of these.

    Example:
        >>> jsonable({"loss": torch.tensor(0.5), "grad_norm": float("inf"), "accuracy": None})
        {'loss': 0.5, 'grad_norm': 'Infinity', 'accuracy': None}
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [jsonable(item) for item in value]
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise TypeError(
            f"expected one number, got a tensor of shape {tuple(value.shape)}: log its mean or its elements"
        )
    if hasattr(value, "item"):  # tensors and NumPy scalars
        return jsonable(value.item())
    raise TypeError(f"expected a number, a string or nested mappings of them, got {type(value).__name__}: {value!r}")


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a reader, or a run killed halfway, sees the old file or the new one and never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes `value` as indented JSON, atomically; see `jsonable` for what it may hold."""
    write_atomically(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
