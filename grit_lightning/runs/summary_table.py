"""The table that ends a run in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

_UNKNOWN = "—"


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Lay out a run's summary: task metrics before and after, what was forgotten, parameters, ranks, times, memory.

    Closed answers have a third column, to read the others by: what always giving the most frequent answer would score.

    Args:
        summary: What `RunRecord` writes to summary.json.
    """
    table = Table(title=f"Run {summary['status']}", min_width=60)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    before, after, majority = (summary["metrics"][name] for name in ("before", "after", "majority"))
    if majority:
        table.add_column(_always(summary["majority_class"]), justify="right")
    for key in sorted({*before, *after}):
        columns = (before, after, majority) if majority else (before, after)
        table.add_row(key, *(_shown(column.get(key), "{:.4f}".format) for column in columns))
    _add_forgetting(table, summary.get("forgetting", {}))
    table.add_section()
    trainable, effective = summary["trainable_parameters"], summary["effective_parameters"]
    table.add_row("trainable parameters", "", f"{trainable:,}")
    if trainable:
        table.add_row("effective parameters", "", f"{effective:,}")
        table.add_row("parameters saved", "", f"{1 - effective / trainable:.1%}")
    for kind, rank in summary["mean_rank_by_type"].items():
        table.add_row(f"mean rank {kind}", "", f"{rank:.2f}")
    table.add_row("reprojections", "", f"{summary['reprojection_count']}")
    table.add_section()
    table.add_row("mean step time", "", _shown(summary["step_time_seconds"]["mean"], _duration))
    table.add_row("geometry share of step time", "", _shown(summary["geometry_share"], "{:.1%}".format))
    table.add_row("peak memory", "", _shown(summary["peak_memory_bytes"], _size))
    return table


def _add_forgetting(table: Table, probes: Mapping[str, Any]) -> None:
    """Add each metric of a `ForgettingProbe` before and after, and the change with its interval."""
    table.add_section()
    for name, probe in probes.items():
        for metric, row in probe.items():
            if not isinstance(row, Mapping):
                continue  # the size of the probe
            table.add_row(f"{name} {metric}", *(_shown(row[when], "{:.4f}".format) for when in ("before", "after")))
            interval = row["interval"] and "{:+.4f} … {:+.4f}".format(*row["interval"])
            change = _shown(row["delta"], "{:+.4f}".format)
            table.add_row(f"  change, {row['confidence']:.0%} interval", interval or _UNKNOWN, change)


def _always(answers: Mapping[str, str]) -> str:
    """Return the heading of the baseline's column: the answer of a single task, as a mixture has several."""
    return f"always “{answers['']}”" if "" in answers else "majority class"


def _shown(value: Any, form: Callable[[Any], str]) -> str:
    return _UNKNOWN if value is None else form(value)


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
