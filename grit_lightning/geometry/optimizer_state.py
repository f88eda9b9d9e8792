"""What optimizers remember of a parameter, by names: which of it follows a change of coordinates, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_lightning.errors import InvalidValueError


@runtime_checkable
class AveragesWeights(Protocol):
    """An optimizer that takes gradients at other weights than those to be evaluated, as schedule-free ones do."""

    def train(self) -> None:
        """Go where the next gradients are to be taken."""

    def eval(self) -> None:
        """Go to the average."""


class Kind(Enum):
    """How a part of the state follows a change of coordinates."""

    FIRST_MOMENT = "as gradients do"
    SECOND_MOMENT = "as squared gradients do"
    WEIGHTS = "as the factors do"


NAMES = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "mu", "grad_avg"), Kind.FIRST_MOMENT),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"), Kind.SECOND_MOMENT),
    "ax": Kind.WEIGHTS,  # ASGD's average
}
_FIRST, _SECOND = (Kind.FIRST_MOMENT,), (Kind.SECOND_MOMENT,)
BITSANDBYTES = {
    "adam": _FIRST + _SECOND,
    "ademamix": _FIRST + _SECOND,  # two first moments, stacked
    "lamb": _FIRST + _SECOND,
    "lion": _FIRST,
    "lars": _FIRST,
    "momentum": _FIRST,
    "adagrad": _SECOND,
    "rmsprop": _SECOND,
}
"""`state1` and `state2` of bitsandbytes' optimizers, by their `optimizer_name`."""
BLOCK = 256
"""Entries that share a scale in bitsandbytes' 8-bit state."""


class Part(NamedTuple):
    """A part of an optimizer's state of one factor, in the factor's shape."""

    name: str
    kind: Kind
    value: Tensor
    """To be changed in place."""
    keep: Callable[[], None]
    """Call it after the change: writes the value back where the optimizer keeps it in another form."""


def require_followable(optimizer: Optimizer) -> None:
    """Refuse optimizers whose state can neither follow a change of coordinates nor begin anew for some parameters.

    Raises:
        ValueError: For LBFGS, and for optimizers that estimate the distance from the start (Prodigy, D-Adaptation).
    """
    estimates_distance = any({"d", "k"} <= settings.keys() for settings in optimizer.param_groups)  # distance and steps
    if estimates_distance or isinstance(optimizer, torch.optim.LBFGS):
        what = "the distance from the start" if estimates_distance else "gradients of all parameters in one vector"
        raise InvalidValueError(
            "model.optimizer: expected one whose state can follow a change of the adapter's coordinates, got "
            f"{type(optimizer).__name__}, which remembers {what}. Set it to another, or remove Reprojection and RankAdaptation."
        )


def parts_of(optimizer: Optimizer, factor: Tensor) -> tuple[list[Part], list[str]]:
    """Return the state of one factor that can follow a change of coordinates, and names of what cannot.

    Args:
        optimizer: Any optimizer.
        factor: A parameter.
    """
    state = optimizer.state.get(factor, {})
    if "state1" in state and getattr(optimizer, "optimizer_name", None) in BITSANDBYTES:
        return list(_bitsandbytes_parts(optimizer, state, factor)), []
    names = NAMES | ({"z": Kind.WEIGHTS} if isinstance(optimizer, AveragesWeights) else {})
    parts, unknown = [], []
    for name, value in state.items():
        if name in names and torch.is_tensor(value) and value.shape == factor.shape:
            parts.append(Part(name, names[name], value, _nothing))
        elif _has_coordinates(value):
            unknown.append(name)
    return parts, unknown


def kept_elsewhere(optimizer: Optimizer) -> list[Any]:
    """Return keys of state that belongs to no parameter, as far as anybody can tell: PEFT's LoRA-FA keeps it by names."""
    states: Mapping[Any, Any] = optimizer.state
    return [key for key, state in states.items() if not torch.is_tensor(key) and _has_coordinates(state)]


def _bitsandbytes_parts(optimizer: Any, state: Mapping[str, Any], factor: Tensor) -> Iterator[Part]:
    """Return first and second moments, those of 8 bit as numbers."""
    for number, kind in enumerate(BITSANDBYTES[optimizer.optimizer_name], start=1):
        packed = state[f"state{number}"]
        stacked = packed.shape != factor.shape
        for index, value in enumerate(packed if stacked else [packed]):
            name = f"state{number}[{index}]"
            if value.dtype == torch.uint8:
                scales = state[f"absmax{number}"]
                yield _unpacked(name, kind, value, scales[index] if stacked else scales, state[f"qmap{number}"])
            else:
                yield Part(name, kind, value, _nothing)


def _unpacked(name: str, kind: Kind, packed: Tensor, scales: Tensor, code: Tensor) -> Part:
    from bitsandbytes import functional  # installed, since the optimizer is one of its own

    value = functional.dequantize_blockwise(packed, absmax=scales, code=code, blocksize=BLOCK)

    def keep() -> None:
        new, state = functional.quantize_blockwise(value, code=code, blocksize=BLOCK)
        zero = code.abs().argmin().to(new.dtype)  # which its kernel for CPUs misses
        packed.copy_(torch.where(value == 0, zero, new))
        scales.copy_(state.absmax)

    return Part(name, kind, value, keep)


def _has_coordinates(value: object) -> bool:
    """Say whether there is a tensor of more than one entry in `value`."""
    if torch.is_tensor(value):
        return value.numel() > 1
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(map(_has_coordinates, inner))


def _nothing() -> None:
    pass
