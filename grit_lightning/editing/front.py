"""The front of what a task loses against what general text gets back, found by measuring few strengths of an edit.

How much an edit costs cannot be predicted well enough to be promised (the predictions are beside every measurement), but both
costs move one way with the strength. So the strength is found by bisection in its logarithm, on held-out rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from grit_lightning.editing.adapter import EditableAdapter
from grit_lightning.editing.measuring import Change, Measurement, Measurer
from grit_lightning.editing.methods import first_order, maps_of, second_order
from grit_lightning.editing.statistics import AdapterStatistics
from grit_lightning.errors import InvalidValueError, require
from grit_lightning.forgetting.without_trace import adapter_off

FIRST_STRENGTH = 0.1
STRIDE = math.sqrt(10.0)
"""First factor between strengths while only one side of the boundary is known; it grows by itself from look to look."""
PRECISION = 1.16
"""The boundary is known well enough when the strengths on its two sides are within this factor."""


@dataclass(frozen=True)
class Target:
    """What is asked of an edit.

    Attributes:
        kind: `task_tolerance`: undo the most forgetting while the task's loss rises by at most `value` (or its metric falls by
            at most that); `forgetting`: the best task loss while general text is at most `value` above the backbone; `mu`: the
            strength itself.
        value: In nats per token, or the metric's unit.

    Raises:
        ValueError: If a tolerance or a strength is negative, or anything is not finite.
    """

    kind: Literal["task_tolerance", "forgetting", "mu"]
    value: float

    def __post_init__(self) -> None:
        """Check the value."""
        good = math.isfinite(self.value) and (self.kind == "forgetting" or self.value >= 0)
        require(
            "retain", self.kind, good, "a finite number" if self.kind == "forgetting" else "a number ≥ 0", self.value
        )

    @classmethod
    def one_of(cls, **values: float | None) -> Target:
        """Return the one target that has a value.

        Raises:
            ValueError: If none or several have.
        """
        given = [(kind, value) for kind, value in values.items() if value is not None]
        if len(given) != 1:
            named = ", ".join(kind for kind, _ in given) or "none"
            raise InvalidValueError(
                f"The target: expected exactly one of {', '.join(values)}, got {named}. Set one of them."
            )
        return cls(*given[0])  # type: ignore[arg-type]


@dataclass(frozen=True)
class FrontPoint:
    """An edit, measured.

    Attributes:
        method: One of `METHODS`; `unedited` and `backbone` for the two ends.
        mu: Its strength; 0 for the unedited adapter, infinite for the backbone.
        task: The task's loss, and its change from the unedited adapter.
        general: The weighted mean loss on general text, and its change from the backbone: what is forgotten.
        beside: Every single set: its loss, and the change from the unedited adapter (task) or from the backbone (others).
        metric: The task's metric and its change from the unedited adapter, None without one.
        predicted: `task_fisher`, `task_first_order`, `general_fisher` (above the backbone) and `general_first_order` (from the
            unedited adapter), nats per token.
    """

    method: str
    mu: float
    task: Change
    general: Change
    beside: Mapping[str, Change]
    metric: Change | None = None
    predicted: Mapping[str, float] = field(default_factory=dict)

    def within(self, target: Target) -> bool:
        """Whether it keeps to the target's bound."""
        if target.kind == "forgetting":
            return self.general.change <= target.value
        if target.kind == "task_tolerance":
            loss = self.task.change if self.metric is None else -self.metric.change
            return loss <= target.value
        return self.mu == target.value

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        plain = asdict(self)
        plain["task"], plain["general"] = self.task._asdict(), self.general._asdict()
        plain["beside"] = {name: change._asdict() for name, change in self.beside.items()}
        plain["metric"] = None if self.metric is None else self.metric._asdict()
        return plain


class Front:
    """Edits of one adapter, each measured once.

    Args:
        adapter: The adapter.
        task: Its statistics on the task.
        general: Its statistics on general text.
        measurer: Measures the model.
        damping: See `functional.retention_map`.

    Attributes:
        points: All that has been measured, in that order; first the unedited adapter, then the backbone.
    """

    def __init__(
        self,
        adapter: EditableAdapter,
        task: AdapterStatistics,
        general: AdapterStatistics,
        measurer: Measurer,
        damping: float = 1e-4,
    ) -> None:
        """Measure both ends."""
        self.adapter, self.task, self.general = adapter, task, general
        self.measurer, self.damping = measurer, damping
        self._unedited = measurer.measure("unedited adapter")
        with adapter_off(adapter.model):  # also what else was trained beside B and A
            self._backbone = measurer.measure("backbone")
        nothing = {name: task.groups[0].a_cov.new_zeros(r, r) for name, r in adapter.ranks.items()}
        self._known: dict[tuple[str, float], FrontPoint] = {}
        self.points = [
            self._point("unedited", 0.0, self._unedited, {}),
            self._point("backbone", math.inf, self._backbone, nothing),
        ]

    def at(self, method: str, mu: float) -> FrontPoint:
        """Return the edit of a method and strength, measured now or before."""
        if mu == 0:
            return self.points[0]
        if (method, mu) not in self._known:
            maps = maps_of(method, self.task, self.general, mu, self.damping)
            with self.adapter.edited(maps):
                measured = self.measurer.measure(f"{method} μ {mu:.3g}")
            self._known[method, mu] = self._point(method, mu, measured, maps)
            self.points.append(self._known[method, mu])
        return self._known[method, mu]

    def search(self, method: str, target: Target, evaluations: int = 8) -> FrontPoint | None:
        """Find a method's best edit for a target.

        Args:
            method: One of `METHODS`.
            target: What is asked.
            evaluations: The most strengths to measure.

        Returns:
            The best of those measured that keep to the target: for a tolerance the one that general text is best at, so that
            all of the tolerance may be spent. None if none does.
        """
        if target.kind == "mu":
            return self.at(method, target.value)
        rises = target.kind == "task_tolerance"  # the bound is kept below the boundary, else above it

        def keeps(strength: float) -> bool:
            return self.at(method, strength if rises else 1.0 / strength).within(target)

        bisect_log(keeps, FIRST_STRENGTH if rises else 1.0 / FIRST_STRENGTH, evaluations)
        kept = [point for point in self.of(method) if point.within(target)]
        return min(kept, key=lambda point: (point.general if rises else point.task).change, default=None)

    def of(self, method: str) -> Sequence[FrontPoint]:
        """Return the measured edits of a method, by strength."""
        return sorted((p for p in self.points if p.method == method), key=lambda p: p.mu)

    def maps(self, point: FrontPoint) -> dict[str, Any]:
        """Return X of every layer for a measured edit."""
        return maps_of(point.method, self.task, self.general, point.mu, self.damping) if point.mu else {}

    def _point(self, method: str, mu: float, measured: Measurement, maps: Mapping[str, Any]) -> FrontPoint:
        judge = self.measurer
        beside = {
            held_out.name: judge.one(held_out, self._unedited if held_out.role == "task" else self._backbone, measured)
            for held_out in judge.sets
        }
        return FrontPoint(
            method,
            mu,
            judge.task(self._unedited, measured),
            judge.general(self._backbone, measured),
            beside,
            judge.of_metric(self._unedited, measured),
            {
                "task_fisher": second_order(self.task, maps),
                "task_first_order": first_order(self.task, maps),
                "general_fisher": second_order(self.general, maps, from_backbone=True),
                "general_first_order": first_order(self.general, maps),
            },
        )


def bisect_log(
    holds: Callable[[float], bool], start: float, evaluations: int, stride: float = STRIDE, precision: float = PRECISION
) -> float | None:
    """Find the largest x > 0 up to which something holds, from few looks, by bisection in log x.

    Args:
        holds: True below the boundary, False above it.
        start: Where to look first.
        evaluations: The most looks.
        stride: Factor between the first two looks while all of them were on one side; it grows by itself every time.
        precision: Stop when the boundary is known to this factor.

    Returns:
        The largest x at which it was seen to hold; None if it never was.

    Example:
        >>> round(bisect_log(lambda x: x <= 0.7, start=0.1, evaluations=20, precision=1.001), 2)
        0.7
    """
    below, above = None, None
    x, reach = start, stride
    for _ in range(evaluations):
        if holds(x):
            below = x
        else:
            above = x
        if below is None:
            x, reach = x / reach, reach * stride
        elif above is None:
            x, reach = x * reach, reach * stride
        elif above / below < precision:
            break
        else:
            x = math.sqrt(below * above)
    return below
