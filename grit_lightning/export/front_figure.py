"""The front as a picture: what general text pays against what the task pays, retention beside its peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grit_lightning.editing.front import FrontPoint


def draw_front(points: Sequence[FrontPoint], chosen: FrontPoint, path: Path) -> None:
    """Draw the measured front into a PNG.

    Args:
        points: The front; the backbone is left out, as its task loss would set the scale.
        chosen: The point to mark.
        path: File to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # seconds to import, and only needed here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    start = next(point for point in points if point.method == "unedited")
    for method in dict.fromkeys(point.method for point in points):
        line = [point for point in points if point.method == method]
        if method == "backbone":
            continue
        if method == "unedited":
            axes.plot(start.general.change, start.task.change, "s", color="black", label="unedited adapter", zorder=3)
            continue
        line = [start, *sorted(line, key=lambda point: point.mu)]
        style: Any = {"linewidth": 2.2} if method == chosen.method else {"linewidth": 1.2, "alpha": 0.8}
        axes.plot(
            [p.general.change for p in line], [p.task.change for p in line], "o-", markersize=4, label=method, **style
        )
    if chosen.general.interval is not None and chosen.task.interval is not None:
        bars: Any = {
            axis: [[change.change - change.interval[0]], [change.interval[1] - change.change]]
            for axis, change in (("xerr", chosen.general), ("yerr", chosen.task))
            if change.interval is not None
        }
        axes.errorbar(chosen.general.change, chosen.task.change, **bars, fmt="none", ecolor="gray", zorder=2)
    axes.plot(
        chosen.general.change,
        chosen.task.change,
        "*",
        color="crimson",
        markersize=14,
        label=f"chosen, μ = {chosen.mu:.3g}",
        zorder=4,
    )
    axes.axvline(0.0, color="gray", linewidth=0.8, linestyle=":")
    axes.axhline(0.0, color="gray", linewidth=0.8, linestyle=":")
    reach = 4.0 * max(chosen.task.change, 0.002)  # stronger edits that were tried on the way would set the scale
    near = [p for p in points if p.method != "backbone" and p.task.change <= reach]
    axes.set_ylim(min(p.task.change for p in near) - 0.1 * reach, 1.1 * reach)
    axes.set_xlim(*_with_margin([p.general.change for p in near]))
    axes.set_xlabel("general text, above the backbone (nats per token)")
    axes.set_ylabel("task, above the unedited adapter (nats per token)")
    axes.legend(frameon=False)
    figure.savefig(path)


def _with_margin(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, *values), max(0.0, *values)
    margin = 0.08 * max(high - low, 1e-3)
    return low - margin, high + margin
