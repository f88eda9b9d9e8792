"""How `grit retain` shows what it does, and then the front that was measured."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from grit_lightning.export.retention_card import shown

if TYPE_CHECKING:
    from grit_lightning.editing.front import FrontPoint
    from grit_lightning.editing.measuring import Change
    from grit_lightning.export.retention import RetentionResult

_WIDE = 200  # characters of a line that goes into a file


def console_for(*, stderr: bool = False) -> Console:
    """Return a console that breaks no lines where they go into a file."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDE)


class Doing:
    """Says what has been done, a line each, and on a terminal with a bar what is being done.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        """Begin without anything to do."""
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._known: dict[str, tuple[TaskID, float]] = {}

    @contextmanager
    def shown(self) -> Iterator[Doing]:
        """Draw the bars for as long as something is done."""
        if not self.console.is_terminal:
            yield self
            return
        with self._bars:
            yield self

    def __call__(self, name: str, done: int, total: int) -> None:
        """Take note of how many rows of something are done."""
        if name not in self._known:
            task = self._bars.add_task(escape(name), total=total)
            self._known[name] = (task, time.perf_counter())
        task, since = self._known[name]
        self._bars.update(task, completed=done)
        if done == total:
            self._bars.remove_task(task)
            del self._known[name]
            self.say(f"{name}: {total:,} rows, {time.perf_counter() - since:.1f} s")

    def say(self, line: str) -> None:
        """Print a line, above the bars."""
        self.console.print(line, soft_wrap=True, markup=False)


def print_front(console: Console, result: RetentionResult, sources: Sequence[str]) -> None:
    """Print the points of a front as a table, the chosen one marked.

    Args:
        console: Where to.
        result: What was measured.
        sources: Names of the general sets.
    """
    points = [point for _, point in sorted(enumerate(result.front), key=lambda pair: (_place(pair[1]), pair[0]))]
    names = ["task loss, change", *(["metric, change"] if result.chosen.metric else [])]
    names += [f"{name}, above base" for name in sources] + ["mean, above base"] * (len(sources) > 1)
    table = Table("", *names)
    if not console.is_terminal:
        table.box, table.padding = None, (0, 2, 0, 0)
    for point in points:
        chosen = (point.method, point.mu) == (result.chosen.method, result.chosen.mu)
        changes = [point.task, *([point.metric] if point.metric else []), *(point.beside[name] for name in sources)]
        changes += [point.general] * (len(sources) > 1)
        cells = (_cell(change, "\n" if console.is_terminal else " ") for change in changes)
        table.add_row(f"{'→' if chosen else ' '} {label(point)}", *cells, style="bold" if chosen else None)
    console.print()
    console.print(table)


def _place(point: FrontPoint) -> int:
    """Where a point stands: the adapter as it is, ours, scaling, other peers, the base model."""
    order = {"unedited": 0, "retention": 1, "scaling": 2, "backbone": 4}
    return order.get(point.method, 3)


def label(point: FrontPoint) -> str:
    """Say in words what an edit is."""
    if point.method == "scaling":
        return f"WiSE-FT, α {1 / (1 + point.mu):.3f}"
    ends = {"unedited": "adapter as it is", "backbone": "base model", "retention": f"retained, μ {point.mu:.3g}"}
    return ends.get(point.method, f"{point.method}, μ {point.mu:.3g}")


def _cell(change: Change, joint: str) -> str:
    """Write a loss or a metric and its change, and then the interval of that, if there is one to speak of."""
    return f"{change.value:.4f} {shown(change)}".replace(" (", f"{joint}(")


def verdict(result: RetentionResult) -> str:
    """Say in one sentence what was reached."""
    chosen, before = result.chosen, result.front[0].general.change
    after = chosen.general.change
    cost = f"the task's loss changes by {shown(chosen.task)}"
    if chosen.metric is not None:
        cost += f" and its metric, which the bound of {result.target.value:g} is on, by {shown(chosen.metric)}"
    strength = f"μ {chosen.mu:.3g}" if math.isfinite(chosen.mu) else "the base model"
    if before <= 0:
        return f"The adapter had forgotten nothing of this text ({before:+.4f} nats per token); at {strength} {cost}."
    share = "all of" if after <= 0 else "nothing of" if after >= before else f"{1 - after / before:.0%} of"
    forgotten = f"{before:+.4f} → {after:+.4f} nats per token above the base model"
    return f"{strength} undoes {share} what was forgotten ({forgotten}); {cost}."
