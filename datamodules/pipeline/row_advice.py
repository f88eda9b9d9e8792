"""What people want to know of their data before they train on them, as sentences. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MANY_REPEATED = 0.05
"""Share of training rows that are copies of others, above which that is said."""
MAJORITY = 0.8
"""Share of training rows in one class, above which that is said."""
FEW = 10
"""Held-out rows below which that is said."""
OUT_OF_MEASURE = 4
"""A row this many times as long as 95% of the rows are at most is out of measure."""
MUCH_PADDING = 0.3
"""Share of padding in the training batches, above which that is said."""

NAMES = {"train": "training", "validation": "validation", "test": "test"}


def task_advice(task: Mapping[str, Any]) -> list[str]:
    """Return what is remarkable about the rows of a task.

    Args:
        task: What `row_report.task_report` returns.
    """
    training = task["splits"]["train"]
    return [
        *_about_lengths(task),
        *_about_ends(training, bool(training["classes"])),
        *_about_repeats(training),
        *_about_overlap(task),
        *_about_classes(training),
    ]


def epoch_advice(epoch: Mapping[str, Any]) -> list[str]:
    """Return what is remarkable about the batches of an epoch.

    Args:
        epoch: What `row_report.epoch_report` returns.
    """
    if epoch["padding_share"] <= MUCH_PADDING:
        return []
    return [
        f"{epoch['padding_share']:.0%} of what the training batches hold is padding: data.length_bucketing or data.packing "
        "spares most of it."
    ]


def _about_lengths(task: Mapping[str, Any]) -> Iterator[str]:
    for split, numbers in task["splits"].items():
        rows, lengths = numbers["rows"], numbers["lengths"]
        read = rows + numbers["left_out"]
        if cut := numbers["cut"]:
            yield (
                f"{cut:,} of {rows:,} {NAMES[split]} rows ({cut / rows:.1%}) are cut to fit into max_length "
                f"{task['max_length']:,}: raise data.max_length to keep them whole."
            )
        if left_out := numbers["left_out"]:
            yield f"{left_out:,} of {read:,} {NAMES[split]} rows ({left_out / read:.1%}) are left out."
        if rows < FEW and split != "train":
            yield f"Rows in the {NAMES[split]} split: {rows}. What is measured on so few says little."
        elif rows == 1:
            yield "There is one training row."
        if unknown := numbers["unknown_tokens"]:
            yield (
                f"{unknown:,} of {numbers['tokens']:,} tokens of the {NAMES[split]} rows are the one for what the tokenizer "
                "does not know."
            )
    lengths = task["splits"]["train"]["lengths"]
    if lengths["longest"] > OUT_OF_MEASURE * lengths["p95"]:
        yield (
            f"The longest training row has {lengths['longest']:,} tokens, where 95% have at most {lengths['p95']:,}: it sets "
            "the memory that a run needs, and the padding of its batch."
        )


def _about_ends(training: Mapping[str, Any], closed: bool) -> Iterator[str]:
    """Skip closed answers, which are compared and not written."""
    without, rows = training["answers_without_end"], training["rows"]
    if without and not closed:
        yield (
            f"{without:,} of {rows:,} training rows hold an answer whose end is not learnt: a model trained on them does not "
            "stop by itself."
        )


def _about_repeats(training: Mapping[str, Any]) -> Iterator[str]:
    rows = training["rows"]
    if (repeated := training["repeated_rows"]) > MANY_REPEATED * rows:
        yield f"{repeated:,} of {rows:,} training rows ({repeated / rows:.1%}) are copies of others."
    if contradicting := training["contradicting_rows"]:
        yield f"{contradicting:,} training rows share their prompt with a training row that answers it differently."


def _about_overlap(task: Mapping[str, Any]) -> Iterator[str]:
    for split, counts in task["overlap"].items():
        rows = task["splits"][split]["rows"]
        if same := counts["same_rows"]:
            yield (
                f"{same:,} of {rows:,} {NAMES[split]} rows ({same / rows:.1%}) are training rows too: what is measured on "
                "them is memory."
            )
        if same := counts["same_prompts"]:
            yield (
                f"{same:,} of {rows:,} {NAMES[split]} rows have the prompt of a training row, which answers it differently."
            )


def _about_classes(training: Mapping[str, Any]) -> Iterator[str]:
    classes, rows = training["classes"], training["rows"]
    if not classes:
        return
    largest = max(classes, key=classes.__getitem__)
    if classes[largest] > MAJORITY * rows:
        yield (
            f"{classes[largest]:,} of {rows:,} training rows ({classes[largest] / rows:.1%}) are {largest!r}: who always says "
            "so is right as often. Look at macro_f1 rather than accuracy."
        )
    if missing := [name for name, count in classes.items() if not count]:
        yield f"No training row is {' or '.join(map(repr, missing))}."
