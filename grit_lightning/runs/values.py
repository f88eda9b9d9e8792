"""Numbers on disk: valid JSON for any float."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from grit_lightning.errors import InvalidTypeError

JSONValue = str | int | float | bool | None | list["JSONValue"] | dict[str, "JSONValue"]


def jsonable(value: Any) -> JSONValue:
    """Turn numbers, one-element tensors and nested mappings or sequences of them into what JSON can hold.

    JSON has no NaN and no infinity, and a reader must be able to tell a run that diverged from one that measured
    nothing: non-finite numbers become the strings `"NaN"`, `"Infinity"` and `"-Infinity"`, which `float` reads
    back, and None stays null.

    Raises:
        TypeError: A value is none of these.

    Example:
        >>> import torch
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
    if hasattr(value, "item"):  # tensors, and NumPy's arrays and scalars; torch is not imported to ask which
        if math.prod(shape := tuple(value.shape)) != 1:
            raise InvalidTypeError(
                f"Expected one number, got a tensor of shape {shape}. Log its mean, or its elements one by one."
            )
        return jsonable(value.item())
    raise InvalidTypeError(
        f"Expected a number, a string, or nested mappings of them, got {type(value).__name__}: {value!r}."
    )


def to_json(value: Any, indent: int | None = None) -> str:
    """Return strict JSON of what `jsonable` takes, on one line unless there is an indent."""
    return json.dumps(jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False)
