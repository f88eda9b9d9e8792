"""What is known of a published data set, to tell a complete copy from a cut or changed one.

Each task has it as its attribute `published`; `grit prepare` compares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import datasets


@dataclass(frozen=True)
class PublishedSplit:
    """A split as it was published.

    Attributes:
        rows: Number of rows, according to the data set's own card.
        sha256: Hash of each column that was computed from a complete copy; no other column is checked.
    """

    rows: int
    sha256: Mapping[str, str] = field(default_factory=dict)


def column_hash(table: datasets.Dataset, column: str) -> str:
    """Return the SHA-256 of a column: its values in order as lines of JSON, without surrounding whitespace."""
    digest = hashlib.sha256()
    for batch in table.select_columns([column]).iter(1000):
        for value in batch[column]:
            plain = value.strip() if isinstance(value, str) else value
            digest.update(json.dumps(plain, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
