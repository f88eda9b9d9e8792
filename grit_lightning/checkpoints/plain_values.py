"""Settings as plain values, which YAML can write and checkpoints can hold without running code when they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def to_plain_values(value: Any) -> Any:
    """Turn sets, tuples, enums and dataclasses into what YAML and `torch.load(weights_only=True)` can hold.

    Example:
        >>> to_plain_values({"targets": {"v_proj", "q_proj"}, "shape": (2, 3)})
        {'targets': ['q_proj', 'v_proj'], 'shape': [2, 3]}
    """
    if isinstance(value, Mapping):
        return {str(key): to_plain_values(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(to_plain_values(item) for item in value)
    if isinstance(value, list | tuple):
        return [to_plain_values(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_plain_values(dataclasses.asdict(value))
    if hasattr(value, "value"):
        return value.value
    return value
