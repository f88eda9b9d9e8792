"""What `retain_adapter` refuses, before it computes and when a target cannot be met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grit_lightning.backbones.inputs import context_length
from grit_lightning.editing.adapter import EditableAdapter
from grit_lightning.editing.front import Front, Target
from grit_lightning.editing.measuring import HeldOut
from grit_lightning.editing.rows import Rows, require_disjoint, require_rows
from grit_lightning.errors import InvalidValueError, require
from grit_lightning.geometry.retention import TOKENS_PER_RANK


def source_weights(
    calibration: Mapping[str, Rows], held_out: Mapping[str, Rows], given: Mapping[str, float]
) -> dict[str, float]:
    """Return the weight of every general source, 1 where none is given.

    Raises:
        ValueError: If a name or a weight makes no sense.
    """
    names = list(dict.fromkeys([*calibration, *held_out]))
    if "task" in names:
        raise InvalidValueError("general_rows: expected names other than 'task', got a source of that name. Rename it.")
    if unknown := sorted(given.keys() - set(names)):
        raise InvalidValueError(f"general_weights: expected names among {', '.join(names)}, got {', '.join(unknown)}.")
    for name, weight in given.items():
        require("retain", f"general_weights of {name}", 0 < weight < math.inf, "a number > 0", weight)
    return {**dict.fromkeys(names, 1.0), **given}


def require_usable_rows(
    editable: EditableAdapter, task: Rows, general: Mapping[str, Rows], held_out: Sequence[HeldOut]
) -> None:
    """Check that the model can read all rows, that they say enough, and that none is on both sides.

    Raises:
        ValueError: If not.
    """
    if not general:
        raise InvalidValueError("general_rows: expected at least one source of general text, got none. Give one.")
    if not any(one.role == "general" for one in held_out):
        raise InvalidValueError("held_out_general: expected at least one source of general text, got none. Give one.")
    names = [one.name for one in held_out]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidValueError(
            f"beside: expected names that no other held-out set has, got {', '.join(twice)} twice. Rename them."
        )
    embeddings = editable.model.get_input_embeddings()
    known = getattr(
        embeddings, "num_embeddings", editable.model.config.get_text_config().vocab_size
    )  # or PEFT wraps them
    limits: dict[str, Any] = {
        "vocabulary": known,
        "context": context_length(editable.model),
    }
    enough = TOKENS_PER_RANK * max(editable.ranks.values())
    require_rows(task, "task_rows", **limits, least_tokens=enough)
    for name, rows in general.items():
        require_rows(rows, f"general_rows of {name}", **limits, least_tokens=enough)
    for one in held_out:
        require_rows(one.rows, f"held-out rows of {one.name}", **limits)
    calibration = [row for rows in (task, *general.values()) for row in rows]
    for one in held_out:
        require_disjoint(calibration, one.rows, f"held-out rows of {one.name}")


def require_something_to_do(front: Front, target: Target) -> None:
    """Refuse a bound that the adapter keeps as it is, or that the backbone keeps too, for which nothing of it would be left.

    Raises:
        ValueError: If it does.
    """
    unedited, backbone = front.points[:2]
    if target.kind == "task_tolerance" and backbone.within(target):
        learnt = backbone.task.change if backbone.metric is None else -backbone.metric.change
        raise InvalidValueError(
            f"task_tolerance: expected less than what the adapter has learnt on the held-out rows, {learnt:.4f}, got "
            f"{target.value:g}, which the backbone keeps too. Lower it. Nothing was written."
        )
    if target.kind == "forgetting" and unedited.within(target):
        raise InvalidValueError(
            f"forgetting: expected a bound below what the adapter has forgotten, {unedited.general.change:+.4f} nats, "
            f"got {target.value:g}, which it keeps as it is. Lower it, or leave the adapter "
            "alone. Nothing was written."
        )


def unmet_target(front: Front, method: str, target: Target) -> InvalidValueError:
    """Say which bound would have been kept, of what was measured."""
    tried = front.of(method)
    if target.kind == "forgetting":
        best = min(tried, key=lambda p: p.general.change)
        return InvalidValueError(
            f"forgetting: expected a bound that some strength keeps, got {target.value:g}: the least that was measured is "
            f"{_up(best.general.change):+.4f} nats per token above the backbone, at μ {best.mu:.3g}. Raise it to "
            "that. Nothing was written."
        )
    best = min(tried, key=lambda p: p.mu)
    cost = best.task.change if best.metric is None else -best.metric.change
    return InvalidValueError(
        f"task_tolerance: expected a bound that some strength keeps, got {target.value:g}: the weakest edit that was measured, "
        f"μ {best.mu:.3g}, costs {_up(cost):.4f}. Raise it to that. Nothing was written."
    )


def _up(value: float) -> float:
    """Round up to what is shown, so that it is a bound that is kept."""
    return math.ceil(value * 1e4) / 1e4
