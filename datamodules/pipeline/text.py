"""Text as it goes to the tokenizer: one spelling for what looks the same. Pure."""

from __future__ import annotations

import re
import unicodedata

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
