"""The random number generators of a process, as plain values that a checkpoint may hold."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the generators of torch, NumPy and Python, and of the GPU that `device` names.

    It consists of lists, numbers and tensors only, so that `torch.load(weights_only=True)` can read it.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # a tuple, by that argument
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(words), next_gauss],
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore all generators to a state from `random_state`; a GPU's only if one was saved."""
    kind, keys, position, has_gauss, gauss = state["numpy"]
    version, words, next_gauss = state["python"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate((version, tuple(words), next_gauss))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
