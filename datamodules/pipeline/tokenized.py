"""A table of rows to a table of token ids, with every row accounted for.

Each row leaves with a status, so nothing is counted on the side: the mapping is a pure function of the table and the
settings, and its result can be stored and read back with the counts still in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from grit_lightning.datamodules.pipeline.encoding import EncodedRow, PromptEncoder
from grit_lightning.datamodules.pipeline.sources import quiet
from grit_lightning.datamodules.pipeline.splits import without_columns
from grit_lightning.datamodules.pipeline.task_rows import MissingColumnError, TaskRow
from grit_lightning.datamodules.pipeline.text import UnusableColumnError, as_text, normalise
from grit_lightning.datamodules.pipeline.token_cache import content_hash, settings_hash, tokenizer_hash
from grit_lightning.errors import InvalidValueError

FORMAT = 3
"""Version of what this module writes for the same rows and settings: raise it when that changes."""

INVALID = "invalid: "
"""How the status of an unusable row begins; what follows says why."""

FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "prompt_length": datasets.Value("int32"),
        "target": datasets.Value("int32"),
        "reference": datasets.Value("string"),
        "status": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class RowEncoder:
    """Checks rows, asks the task for their answers and encodes both.

    Attributes:
        encoder: Rows to token ids.
        answer: Answer of a row; raises ValueError for a row without a usable one.
        choices: Closed answers in class order; empty for free answers.
        invalid_rows: Raise an error for an unusable row, or give it a status that says why.
        normalise_text: Normalise all text first.
        answer_version: Changes with what `answer` does; part of the key.
        where: What the table is, for messages.
        names: Task column → column of the source, for messages.
        found: All columns of the source, for messages.
    """

    encoder: PromptEncoder
    answer: Callable[[Mapping[str, Any]], str]
    choices: Sequence[str] = ()
    invalid_rows: Literal["error", "skip"] = "error"
    normalise_text: bool = True
    answer_version: str = ""
    where: str = "data"
    names: Mapping[str, str] = field(default_factory=dict)
    found: Sequence[str] = ()

    def encode_table(
        self, table: datasets.Dataset, row_numbers: Sequence[int], file: Path | None = None
    ) -> datasets.Dataset:
        """Encode a table, some rows at a time.

        Args:
            table: The task's columns.
            row_numbers: Number of each row in the source, for messages.
            file: Where to write the result, which then appears whole or not at all; None keeps it in memory.

        Returns:
            One encoded row for each row, with `input_ids`, their number `length`, `prompt_length`, `target` (class index; -1
            for free answers), `reference` (the answer as text) and `status`. Unusable rows have no ids.

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
        encoder = self.encoder
        template = {name: getattr(encoder.template, name) for name in encoder.template.__dataclass_fields__}
        del template["name"]  # where it came from does not matter
        return settings_hash(
            {
                "format": FORMAT,
                "rows": content_hash(table),
                "answer": self.answer_version,
                "choices": list(self.choices),
                "invalid_rows": self.invalid_rows,
                "normalise_text": self.normalise_text,
                "template": template,
                "tokenizer": tokenizer_hash(encoder.tokenizer),
                "use_chat_template": encoder.use_chat_template,
                "append_eos": encoder.append_eos,
                "allow_control_tokens": encoder.allow_control_tokens,
                "max_length": encoder.max_length,
            }
        )

    def encode_batch(self, batch: Mapping[str, list[Any]], row_numbers: Sequence[int]) -> dict[str, list[Any]]:
        """Encode a batch of rows, columnwise in and out, as `datasets.Dataset.map` has it."""
        rows = [dict(zip(batch, map(self._clean, values), strict=True)) for values in zip(*batch.values(), strict=True)]
        read = [self._read(row, number) for row, number in zip(rows, row_numbers, strict=True)]
        usable = [found for found in read if not isinstance(found, str)]
        answers = [None if isinstance(found, str) else found[1] for found in read]
        ready = iter(self.encoder.encode([prompt for prompt, _ in usable], [answer for _, answer in usable]))
        encoded = [EncodedRow([], 0, "invalid") if isinstance(found, str) else next(ready) for found in read]
        return {
            "input_ids": [row.input_ids for row in encoded],
            "length": [len(row.input_ids) for row in encoded],
            "prompt_length": [row.prompt_length for row in encoded],
            "target": [self.choices.index(answer) if answer in self.choices else -1 for answer in answers],
            "reference": [answer or "" for answer in answers],
            "status": [
                f"{INVALID}{found}" if isinstance(found, str) else row.status
                for found, row in zip(read, encoded, strict=True)
            ],
        }

    def _clean(self, value: Any) -> Any:
        return normalise(value) if self.normalise_text and isinstance(value, str) else value

    def _read(self, row: Mapping[str, Any], number: int) -> tuple[dict[str, str], str] | str:
        """Return the texts of the prompt's columns and the answer of a row; or, to skip the row, why it cannot be used."""
        template = self.encoder.template
        checked = TaskRow(row, template.prompt_without)
        try:
            prompt = {column: as_text(checked[column], column) for column in sorted(template.columns)}
            answer = self.answer(checked)
            if not isinstance(answer, str):
                raise InvalidValueError(f"answer: expected text from the task's `answer`, got {answer!r}")
            if self.choices and answer not in self.choices:
                raise InvalidValueError(f"answer: expected one of {list(self.choices)}, got {answer!r}")
        except MissingColumnError as error:
            missing = [self._name(error.args[0])]
            raise InvalidValueError(without_columns(self.where, missing, self.found or list(row))) from error
        except UnusableColumnError as error:
            name = self._name(error.column)
            return self._skip(number, f"column {name!r}: {error.problem}", f"column {name!r} empty or no text", error)
        except ValueError as error:
            return self._skip(number, str(error), "no usable answer", error)
        except KeyError as error:  # of a dictionary of labels
            return self._skip(
                number, f"answer: expected a label that the task knows, got {error}", "no usable answer", error
            )
        return prompt, answer

    def _skip(self, number: int, problem: str, reason: str, error: Exception) -> str:
        """Return the reason to skip a row, or raise an error if no row may be skipped."""
        if self.invalid_rows == "skip":
            return reason
        raise InvalidValueError(
            f"{self.where}, row {number + 1}: {problem}. Correct it, or set invalid_rows=skip to leave such rows out."
        ) from error

    def _name(self, column: str) -> str:
        """Return what the source calls a column of the task."""
        return self.names.get(column, column)


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
