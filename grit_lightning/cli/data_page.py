"""A report on data as a page: tables and bars, and rows with what is learnt in colour, or in ⟦ ⟧ where there is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grit_lightning.datamodules.pipeline.row_advice import NAMES

MOST_TOKENS = 600
"""Tokens of a row that are shown; of a longer row the middle is left out."""
BAR = 40
"""Characters of the longest bar."""
READ = ("", "bright_white on grey35")
LEARNT = ("black on green3", "bright_white on dark_green")
"""Styles of tokens, one after the other in turn, so that it shows where a token ends; on any background."""


def print_report(console: Console, report: Mapping[str, Any]) -> None:
    """Print a report.

    Args:
        console: Where to. Without colours, what is learnt stands in ⟦ ⟧.
        report: What `data_report` returns.
    """
    _say(console, f"{report['data']}, tokenizer {report['tokenizer'] or 'unknown'}")
    for remark in report["remarks"]:
        _say(console, remark)
    for name, task in report["tasks"].items():
        _print_task(console, name, task)
    _print_epoch(console, report["epoch"], report["run"])
    for name, task in report["tasks"].items():
        for row in task["rows"]:
            _print_row(console, name, row, task["splits"][row["split"]]["rows"])
    advice = [(name, said) for name, task in report["tasks"].items() for said in task["advice"]]
    advice += [("", said) for said in report["epoch"]["advice"]]
    if advice:
        _say(console, "\nWorth knowing", "bold")
    for name, said in advice:
        _say(console, f"  {'⚠' if console.color_system else '!'} {f'{name}: ' if name else ''}{said}", "yellow")


def _print_task(console: Console, name: str, task: Mapping[str, Any]) -> None:
    splits = task["splits"]
    bound = "no bound" if task["max_length"] is None else f"max_length {task['max_length']:,}"
    title = ", ".join(filter(None, (name, task["source"], bound)))
    table = Table("", *(NAMES[split] for split in splits), title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in _cells(task):
        table.add_row(*row)
    console.print()
    console.print(table)
    for split, numbers in splits.items():
        for what, count in numbers["problems"].items():
            _say(console, f"{NAMES[split]}: {count:,} {what}")
    _say(console, "\nTokens of the training rows")
    for line in _bars(splits["train"]["histogram"]):
        _say(console, line)


def _cells(task: Mapping[str, Any]) -> Iterator[list[str]]:
    splits = list(task["splits"].values())

    def row(label: str, cells: Sequence[Any]) -> list[str]:
        return [label, *(cell if isinstance(cell, str) else f"{cell:,}" for cell in cells)]

    yield row("rows", [split["rows"] for split in splits])
    yield row("  a part cut", [split["cut"] for split in splits])
    yield row("  left out", [split["left_out"] for split in splits])
    yield row("tokens", [split["tokens"] for split in splits])
    yield row("  learnt", [f"{split['learnt_tokens'] / split['tokens']:.1%}" for split in splits])
    for key, label in (("median", "median"), ("p95", "95% at most"), ("longest", "longest")):
        yield row(f"tokens of a row, {label}", [split["lengths"][key] for split in splits])
    yield row("copies of other rows", [split["repeated_rows"] for split in splits])
    if any(split["contradicting_rows"] for split in splits):
        yield row("same prompt, other answer", [split["contradicting_rows"] for split in splits])
    for key, label in (("same_rows", "also in training"), ("same_prompts", "  prompt only")):
        found = [task["overlap"].get(name, {}).get(key, "") for name in task["splits"]]
        if any(found):
            yield row(label, found)
    for choice in splits[0]["classes"]:
        counts = [split["classes"][choice] for split in splits]
        shares = zip(counts, splits, strict=True)
        yield row(f"{choice!r}", [f"{count:,} ({count / split['rows']:.0%})" for count, split in shares])


def _bars(bins: Sequence[Mapping[str, int]]) -> Iterator[str]:
    most = max(bin_["rows"] for bin_ in bins)
    labels = [f"{bin_['from']:,}" + f"–{bin_['to']:,}" * (bin_["to"] > bin_["from"]) for bin_ in bins]
    for label, bin_ in zip(labels, bins, strict=True):
        length = -(-bin_["rows"] * BAR // most)
        yield f"  {label:>{max(map(len, labels))}}  {'█' * length}{' ' * bool(length)}{bin_['rows']:,}"


def _print_epoch(console: Console, epoch: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    batches = "an unknown number of" if epoch["batches"] is None else f"{epoch['batches']:,}"
    processes = "" if epoch["processes"] == 1 else f" in each of {epoch['processes']} processes"
    said = f"An epoch: {batches} batches{processes}"
    if epoch["optimizer_steps"] is not None:
        said += f", {epoch['optimizer_steps']:,} optimizer steps of {epoch['batches_per_step']}"
    if epoch["tokens"] is not None:
        said += f", {epoch['rows']:,} {'packed ' * epoch['packed']}rows, {epoch['tokens']:,} tokens"
    _say(console, f"\n{said}, {epoch['padding_share']:.1%} padding.")
    steps, of_epoch = run["optimizer_steps"], epoch["optimizer_steps"]
    passes = f"{steps / of_epoch:.2g}" if steps and of_epoch else ""
    epochs = f", {passes} epoch{'s' * (passes != '1')}" if passes else ""
    _say(console, "The run: no end is set." if steps is None else f"The run: {steps:,} optimizer steps{epochs}.")


def _print_row(console: Console, name: str, row: Mapping[str, Any], rows: int) -> None:
    learnt = sum(row["learnt"][1::2]) - sum(max(start, 1) for start in row["learnt"][::2])  # nothing predicts the first
    of = f"{name}, " if name else ""
    head = f"{of}{NAMES[row['split']]} row {row['row'] + 1:,} of {rows:,}: {len(row['tokens']):,} tokens, {learnt:,} learnt"
    _say(console, f"\n{head}", "bold")
    console.print(row_text(row, colours=console.color_system is not None and not console.no_color), soft_wrap=True)


def row_text(row: Mapping[str, Any], colours: bool) -> Text:
    """Return the text of a row in which tokens can be told apart, or the learnt ones stand in ⟦ ⟧ if there are no colours.

    Args:
        row: A row of `SeenTask.shown`.
        colours: Whether colours can be seen.
    """
    tokens, spans = row["tokens"], row["learnt"]
    starts, ends = set(spans[::2]), set(spans[1::2])
    hidden = range(MOST_TOKENS // 2, len(tokens) - MOST_TOKENS // 2)
    text, learns = Text(), False
    for position in range(len(tokens) + 1):
        if position in starts | ends:
            learns = position in starts
            if not colours:
                text.append("⟧" * (position in ends) + "⟦" * learns)
        if position == len(tokens):
            break
        if position in hidden:
            if position == hidden.start:
                text.append(f" … {len(hidden):,} tokens … ", "italic")
            continue
        shown = tokens[position].replace("\x1b", "␛")
        if colours:
            styles = LEARNT if learns else READ
            text.append(shown.replace("\n", "↵\n"), styles[position % 2])
        else:
            text.append(shown)
    return text


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style), soft_wrap=True)
