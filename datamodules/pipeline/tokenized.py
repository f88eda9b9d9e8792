"""A table of rows to a table of token ids, with every row accounted for.

Each row leaves with a status, so nothing is counted on the side: the mapping is a pure function of the table and the
settings, and its result can be stored and read back with the counts still in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np

from grit_lightning.datamodules.pipeline.sources import quiet
from grit_lightning.datamodules.pipeline.text import normalise
from grit_lightning.datamodules.pipeline.token_cache import content_hash, settings_hash
from grit_lightning.errors import InvalidValueError

FORMAT = 4
"""Version of what this package writes for the same rows and settings: raise it when that changes."""

INVALID = "invalid: "
"""How the status of an unusable row begins; what follows says why."""

FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "prompt_length": datasets.Value("int32"),
        "learnt": datasets.Sequence(datasets.Value("int32")),
        "target": datasets.Value("int32"),
        "reference": datasets.Value("string"),
        "status": datasets.Value("string"),
    }
)

Status = str
"""How a row came through: `whole`; `truncated`, with a part cut; `too_long`, without room for its answer; `INVALID` and why."""


class EncodedRow(NamedTuple):
    """Token ids of a row, which of them are learnt, and how the row came through.

    Attributes:
        input_ids: Token ids.
        learnt: Where what is learnt begins and ends: start, end, start, end …
        status: How the row came through.
        target: Class index of the answer; -1 for free answers.
        reference: The last answer, as text.
    """

    input_ids: list[int]
    learnt: list[int]
    status: Status
    target: int = -1
    reference: str = ""

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the last answer."""
        return self.learnt[-2] if self.learnt else 0


@dataclass(frozen=True, kw_only=True)
class RowEncoder(ABC):
    """Checks rows and turns them into token ids.

    Attributes:
        invalid_rows: Raise an error for an unusable row, or give it a status that says why.
        normalise_text: Normalise all text first.
        version: Changes with what the task's own code does; part of the key.
        where: What the table is, for messages.
        names: Task column → column of the source, for messages.
        found: All columns of the source, for messages.
    """

    invalid_rows: Literal["error", "skip"] = "error"
    normalise_text: bool = True
    version: str = ""
    where: str = "data"
    names: Mapping[str, str] = field(default_factory=dict)
    found: Sequence[str] = ()

    @abstractmethod
    def encode_rows(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[EncodedRow]:
        """Encode rows, in their order; a row may become several.

        Args:
            rows: Values by column.
            numbers: Number of each row in the source, for messages.

        Raises:
            ValueError: A row is unusable and `invalid_rows` is "error"; names row and column.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what else the result depends on, as plain values."""

    def encode_table(
        self, table: datasets.Dataset, row_numbers: Sequence[int], file: Path | None = None
    ) -> datasets.Dataset:
        """Encode a table, some rows at a time.

        Args:
            table: The task's columns.
            row_numbers: Number of each row in the source, for messages.
            file: Where to write the result, which then appears whole or not at all; None keeps it in memory.

        Returns:
            Encoded rows with `input_ids`, their number `length`, `prompt_length`, `learnt` (spans: start, end, start, end …),
            `target` (class index; -1 for free answers), `reference` (the answer as text) and `status`. Unusable rows have
            no ids.

        Raises:
            ValueError: A row is unusable and `invalid_rows` is "error"; names row and column.
        """
        with quiet():
            return table.map(
                lambda batch, indices: self.encode_batch(batch, [row_numbers[index] for index in indices]),
                batched=True,
                with_indices=True,
                remove_columns=table.column_names,
                features=FEATURES,
                keep_in_memory=file is None,
                cache_file_name=None if file is None else str(file),
                load_from_cache_file=False,
                new_fingerprint="tokenized",  # spares hashing the tokenizer
            )

    def key(self, table: datasets.Dataset) -> str:
        """Return a hash of everything that the result of `encode_table` depends on."""
        shared = {"invalid_rows": self.invalid_rows, "normalise_text": self.normalise_text, "version": self.version}
        return settings_hash({"format": FORMAT, "rows": content_hash(table), **shared, **self.settings()})

    def encode_batch(self, batch: Mapping[str, list[Any]], row_numbers: Sequence[int]) -> dict[str, list[Any]]:
        """Encode a batch of rows, columnwise in and out, as `datasets.Dataset.map` has it."""
        rows = [dict(zip(batch, map(self._clean, values), strict=True)) for values in zip(*batch.values(), strict=True)]
        encoded = self.encode_rows(rows, row_numbers)
        return {
            "input_ids": [row.input_ids for row in encoded],
            "length": [len(row.input_ids) for row in encoded],
            "prompt_length": [row.prompt_length for row in encoded],
            "learnt": [row.learnt for row in encoded],
            "target": [row.target for row in encoded],
            "reference": [row.reference for row in encoded],
            "status": [row.status for row in encoded],
        }

    def skip(self, number: int, problem: str, reason: str, error: Exception) -> EncodedRow:
        """Return an empty row that says why it is left out, or raise an error if no row may be.

        Args:
            number: Number of the row in the source.
            problem: What was expected and what came, for the error.
            reason: The same, short, to be counted with other rows.
            error: What was caught.

        Raises:
            ValueError: `invalid_rows` is "error".
        """
        if self.invalid_rows == "skip":
            return EncodedRow([], [], f"{INVALID}{reason}")
        raise InvalidValueError(
            f"{self.where}, row {number + 1}: {problem}. Correct it, or set invalid_rows=skip to leave such rows out."
        ) from error

    def name(self, column: str) -> str:
        """Return what the source calls a column of the task."""
        return self.names.get(column, column)

    def _clean(self, value: Any) -> Any:
        return normalise(value) if self.normalise_text and isinstance(value, str) else value


def drop_unusable(encoded: datasets.Dataset) -> tuple[datasets.Dataset, Counter[str]]:
    """Return the rows of an encoded table that have token ids, without `status`, and the number of rows of each status."""
    statuses = encoded.with_format("numpy")["status"][:]
    kept = np.flatnonzero(np.isin(statuses, ["whole", "truncated"]))
    counts = dict(zip(*np.unique(statuses, return_counts=True), strict=True))
    rows = encoded.remove_columns("status")
    return (
        rows if len(kept) == len(statuses) else rows.select(kept),
        Counter({str(status): int(count) for status, count in counts.items()}),
    )
