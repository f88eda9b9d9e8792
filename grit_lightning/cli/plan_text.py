"""How `grit plan` shows its report: a few lines, a table of memory, and what the numbers stand for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

PARTS = {
    "weights": "weights",
    "adapter": "adapter",
    "optimizer": "optimizer states",
    "statistics": "statistics",
    "activations": "activations, gradients",
    "exchange": "exchange of gradients",
}
"""Rows of the table, by their names in the report."""
_WIDE = 200  # characters of a line that goes into a file


def print_plan(report: dict[str, Any]) -> None:
    """Print a report, with a ruled table on a terminal and in plain text elsewhere.

    Args:
        report: From `make_report`.
    """
    on_terminal = sys.stdout.isatty()
    console = Console() if on_terminal else Console(width=_WIDE)
    for line in _lines(report):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(_table(report["memory"], ruled=on_terminal))
    for line in [*_notes(report), *_measured(report.get("measured"))]:
        console.print(line, soft_wrap=True, highlight=False)


def _table(memory: dict[str, dict[str, Any]], *, ruled: bool) -> Table:
    table = Table("memory of a process")
    if not ruled:
        table.box, table.padding = None, (0, 2, 0, 0)
    for name in memory:
        table.add_column(name, justify="right")
    for key, name in PARTS.items():
        if any(parts[key] for parts in memory.values()):
            table.add_row(name, *(_size(parts[key]) for parts in memory.values()))
    table.add_row("total", *(_size(parts["total"]) for parts in memory.values()))
    return table


def _lines(report: dict[str, Any]) -> Iterator[str]:
    backbone, adapter, run, batch = (report[name] for name in ("backbone", "adapter", "run", "micro_batch"))
    packed = f", {backbone['quantization']}" if backbone["quantization"] else ""
    yield f"backbone     {backbone['source']}: {backbone['parameters']:,} parameters, {backbone['dtype']}{packed}"
    kinds = ", ".join(f"{count} {kind}" for kind, count in adapter["layers"].items())
    trained = adapter["trainable_parameters"]
    share = f"{trained:,} trainable parameters, {trained / backbone['parameters']:.2%} of the backbone's"
    yield f"adapter      {sum(adapter['layers'].values())} layers ({kinds}): {share}"
    steps = "without end, nothing limits them" if run["optimizer_steps"] is None else f"{run['optimizer_steps']:,}"
    several = f" on {run['processes']} processes" if run["processes"] > 1 else ""
    micro = f"{run['micro_batches_a_step']} × {run['rows_a_micro_batch']} rows"
    yield f"steps        {steps}; {micro} a step and process, {run['placement']}{several}"
    yield f"micro-batch  {batch['rows']} × {batch['tokens']} tokens: of the first epoch, the one that takes most"
    yield f"checkpoint   {_size(report['checkpoint'])}"
    yield ""


def _notes(report: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield (
        f"{_size(report['logits'])} of the activations are logits. Rows of data.max_length tokens that are all learnt would "
        f"take {_size(report['activations_at_most'])} of activations."
    )
    if report["memory"]["one device"]["optimizer"] is None:
        yield "The optimizer's states are not known, as it takes no step here: totals and checkpoint are without them."


def _measured(measured: dict[str, Any] | None) -> Iterator[str]:
    if measured is None:
        return
    finish = measured["time_to_finish"]
    whole = "" if finish is None else f", {_duration(finish)} for all steps"
    yield f"measured     {measured['seconds_per_step']:.3g} s a step (median of {measured['steps']}){whole}"
    taken = "" if measured["device"] is None else f"; the process took {_size(measured['device'])}"
    tensors, estimated = _size(measured["tensors"]), _size(measured["estimated"])
    yield f"             {tensors} of tensors at the peak, {estimated} estimated{taken}"


def _size(size: int | None) -> str:
    if size is None:
        return "not known"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
