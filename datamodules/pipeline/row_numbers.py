"""What can be counted in encoded rows: lengths, what is learnt, repeated rows, classes, padding. Pure.

A span is two numbers, the first token and the one behind the last; `learnt` lists the spans of a row one after another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

BINS = 12
"""About so many bars has a histogram."""


@dataclass(frozen=True)
class TokenRows:
    """The rows of a split.

    Attributes:
        tokens: Token ids of each row.
        learnt: Spans of each row that are learnt: start, end, start, end …
        prompt_lengths: Tokens before the last answer of each row.
        targets: Class of each row; -1 without classes.
    """

    tokens: Sequence[NDArray[np.int32]]
    learnt: Sequence[Sequence[int]]
    prompt_lengths: Sequence[int]
    targets: Sequence[int]

    @classmethod
    def of(cls, examples: datasets.Dataset) -> TokenRows:
        """Read what a data module's `examples` returns."""
        columns = examples.with_format("numpy")
        return cls(
            [np.asarray(row, dtype=np.int32) for row in columns["input_ids"][:]],
            examples["learnt"][:],
            examples["prompt_length"][:],
            examples["target"][:],
        )

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.tokens]

    @cached_property
    def learnt_lengths(self) -> list[int]:
        """Tokens of each row that are learnt; the first of a row never is, as nothing stands before it."""
        return [sum(spans[1::2]) - sum(max(start, 1) for start in spans[::2]) for spans in self.learnt]

    @cached_property
    def keys(self) -> list[bytes]:
        """A hash of each row, alike for equal rows."""
        return [_hash(row) for row in self.tokens]

    @cached_property
    def prompt_keys(self) -> list[bytes | None]:
        """A hash of what stands before the last answer of each row; None where nothing does but a begin-of-sequence token."""
        pairs = zip(self.tokens, self.prompt_lengths, strict=True)
        return [_hash(row[:length]) if length > 1 else None for row, length in pairs]

    def unended(self, stop_ids: Iterable[int]) -> int:
        """Return the number of rows with a prompt of which an answer holds no token that ends it.

        Args:
            stop_ids: Tokens that end an answer.
        """
        stops = np.array(sorted(set(stop_ids)), dtype=np.int32)

        def ends(row: NDArray[np.int32], spans: Sequence[int]) -> bool:
            return all(np.isin(row[start:end], stops).any() for start, end in zip(spans[::2], spans[1::2], strict=True))

        answers = zip(self.tokens, self.learnt, self.prompt_keys, strict=True)
        return sum(prompt is not None and not ends(row, spans) for row, spans, prompt in answers)

    def count(self, token: int) -> int:
        """Return how often a token stands in the rows."""
        return sum(int((row == token).sum()) for row in self.tokens)


def lengths_in_numbers(lengths: Sequence[int]) -> dict[str, float]:
    """Return shortest, median, mean, 95th percentile and longest of the lengths; at least one is needed.

    Example:
        >>> lengths_in_numbers([1, 2, 3, 10])
        {'shortest': 1, 'median': 2, 'mean': 4.0, 'p95': 10, 'longest': 10}
    """
    return {
        "shortest": min(lengths),
        "median": int(np.percentile(lengths, 50, method="lower")),
        "mean": sum(lengths) / len(lengths),
        "p95": int(np.percentile(lengths, 95, method="higher")),
        "longest": max(lengths),
    }


def histogram(lengths: Sequence[int]) -> list[dict[str, int]]:
    """Count lengths in bins of one width, a round number; the last bin holds everything above it.

    The width follows the 95th percentile, so that one row out of measure does not make one bar of all others.

    Returns:
        For each bin its shortest and longest length, both included, and the number of rows.

    Example:
        >>> histogram([1, 3, 4, 90])[:2]
        [{'from': 0, 'to': 9, 'rows': 3}, {'from': 10, 'to': 19, 'rows': 0}]
    """
    width = _round_width(np.percentile(lengths, 95, method="higher") / BINS)
    last = min(max(lengths) // width, math.ceil(BINS * 1.25))
    rows = Counter(min(length // width, last) for length in lengths)
    bins = [{"from": bin_ * width, "to": (bin_ + 1) * width - 1, "rows": rows[bin_]} for bin_ in range(last + 1)]
    bins[-1]["to"] = max(lengths)
    return bins[min(rows) :]


def padding_share(batches: Iterable[Sequence[int]]) -> float:
    """Return the share of the positions of batches that is padding.

    Args:
        batches: Tokens of each row of each batch.

    Example:
        >>> padding_share([[4, 2], [2, 2, 2, 2]])
        0.125
    """
    positions = tokens = 0
    for lengths in batches:
        positions += len(lengths) * max(lengths)
        tokens += sum(lengths)
    return 1 - tokens / positions


def repeated_rows(rows: TokenRows) -> int:
    """Return the number of rows that stand further up already."""
    return len(rows.keys) - len(set(rows.keys))


def contradicting_rows(rows: TokenRows) -> int:
    """Return the number of rows whose prompt stands in another row too, with another answer."""
    answers: dict[bytes, set[bytes]] = {}
    for prompt, key in zip(rows.prompt_keys, rows.keys, strict=True):
        if prompt is not None:
            answers.setdefault(prompt, set()).add(key)
    return sum(prompt is not None and len(answers[prompt]) > 1 for prompt in rows.prompt_keys)


def overlap(training: TokenRows, held_out: TokenRows) -> dict[str, int]:
    """Count held-out rows that a model trains on.

    Returns:
        `same_rows`, which are training rows too, and `same_prompts`, whose prompt is that of a training row with another
        answer.
    """
    rows, prompts = set(training.keys), set(training.prompt_keys) - {None}
    same = [key in rows for key in held_out.keys]
    prompt_only = [not whole and key in prompts for whole, key in zip(same, held_out.prompt_keys, strict=True)]
    return {"same_rows": sum(same), "same_prompts": sum(prompt_only)}


def class_counts(targets: Sequence[int], choices: Sequence[str]) -> dict[str, int]:
    """Return the number of rows of each class, by its name.

    Example:
        >>> class_counts([0, 1, 1], ["no", "yes", "maybe"])
        {'no': 1, 'yes': 2, 'maybe': 0}
    """
    counts = Counter(targets)
    return {choice: counts[index] for index, choice in enumerate(choices)}


def split_in_numbers(
    rows: TokenRows, choices: Sequence[str], stop_ids: Iterable[int] | None, unknown: int | None
) -> dict[str, Any]:
    """Return everything that is said of one split.

    Args:
        rows: Its rows, at least one.
        choices: Names of the classes; empty for free answers.
        stop_ids: Tokens that end an answer; None if they are not known.
        unknown: The tokenizer's token for what it does not know; None if it knows everything.
    """
    return {
        "rows": len(rows.tokens),
        "tokens": sum(rows.lengths),
        "learnt_tokens": sum(rows.learnt_lengths),
        "unknown_tokens": 0 if unknown is None else rows.count(unknown),
        "lengths": lengths_in_numbers(rows.lengths),
        "histogram": histogram(rows.lengths),
        "answers_without_end": None if stop_ids is None else rows.unended(stop_ids),
        "repeated_rows": repeated_rows(rows),
        "contradicting_rows": contradicting_rows(rows),
        "classes": class_counts(rows.targets, choices),
    }


def _round_width(width: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50 … that is at least a width."""
    power = 10 ** math.floor(math.log10(max(width, 1)))
    return next(int(step * power) for step in (1, 2, 5, 10) if step * power >= width)


def _hash(tokens: NDArray[np.int32]) -> bytes:
    return blake2b(tokens.tobytes(), digest_size=16).digest()
