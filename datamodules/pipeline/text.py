"""Text as it goes to the tokenizer: what is a text and what is not, and one spelling for what looks the same. Pure."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from grit_lightning.errors import InvalidValueError

_CONTROLS = dict.fromkeys([*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), 0xFEFF])  # all but tab and line feed
_LINE_ENDS = re.compile(r"\r\n?|\x85|\u2028|\u2029")
_TRAILING = re.compile(r"[^\S\n]+$", re.MULTILINE)


def normalise(text: str) -> str:
    r"""Bring a text into the form that models have met most often.

    Unicode in composed form (NFC), every line end a line feed, no control characters but tab and line feed, no
    byte-order mark, and no whitespace at the end of a line or of the text. Whitespace at the start stays: code needs it.

    Example:
        >>> normalise("Cafe\u0301 \r\n\tnoir\x00\n\n")
        'Café\n\tnoir'
    """
    text = _LINE_ENDS.sub("\n", unicodedata.normalize("NFC", text)).translate(_CONTROLS)
    return _TRAILING.sub("", text).rstrip()


class UnusableColumnError(InvalidValueError):
    """A column of a row cannot be used.

    Attributes:
        column: Its name.
        problem: What was expected and what came.
    """

    def __init__(self, column: str, problem: str) -> None:
        """Keep both."""
        super().__init__(column, problem)
        self.column, self.problem = column, problem

    def __str__(self) -> str:
        """Return the message."""
        return f"column {self.column!r}: {self.problem}"


def as_text(value: Any, column: str) -> str:
    """Return the value of a column as text, if it is one: a text itself, a whole number, or nothing, which is empty.

    The readers give every text and number of a text file as it is written. What has no one spelling is refused here, for
    every source alike: lists and objects, true and false, dates, and a table's floating-point numbers, NaN among them.

    Raises:
        ValueError: It is something else; names the column.

    Example:
        >>> as_text("1.50", "answer"), as_text(7, "answer"), as_text(None, "answer")
        ('1.50', '7', '')
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:59]}…"
    raise UnusableColumnError(column, f"expected text, got {shown} of type {type(value).__name__}")
