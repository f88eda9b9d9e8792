"""Plain text files to rows, and documents to blocks of tokens that are all learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from grit_lightning.datamodules.pipeline.sources import READERS, Reader
from grit_lightning.datamodules.pipeline.text import UnusableColumnError, as_text
from grit_lightning.datamodules.pipeline.text_files import PLAIN_TEXT, open_text
from grit_lightning.datamodules.pipeline.text_tokens import TextTokens
from grit_lightning.datamodules.pipeline.token_cache import tokenizer_hash
from grit_lightning.datamodules.pipeline.tokenized import EncodedRow, RowEncoder

Division = Literal["files", "passages", "lines"]

PASSAGE = 4_000
"""Characters after which a passage ends with its paragraph: about 1,000 tokens of English."""

_SCHEMA = pa.schema({"text": pa.string()})
_ROWS_AT_ONCE = 1000


def text_readers(division: Division) -> Mapping[str, Reader]:
    """Return the readers of all files that have a column `text`, or are nothing but text.

    Args:
        division: What a document is in files that are nothing but text.
    """
    reader = partial(read_text, division=division)
    return {**READERS, **dict.fromkeys(PLAIN_TEXT, reader)}


def read_text(files: Sequence[Path], *, division: Division) -> tuple[pa.Schema, Iterator[pa.Table]]:
    """Read files that are nothing but text, as documents in a column `text`; those that hold only white space are left out.

    Args:
        files: Text files, UTF-8.
        division: `files`: each is a document; `passages`: each is cut at the end of a paragraph (else of a line) once a
            passage has 4,000 characters; `lines`: each line is a document.

    Raises:
        ValueError: A file is not UTF-8.
    """

    def tables() -> Iterator[pa.Table]:
        batch: list[str] = []
        for document in (document for file in files for document in _documents(file, division)):
            batch.append(document)
            if len(batch) == _ROWS_AT_ONCE:
                yield pa.table({"text": batch}, schema=_SCHEMA)
                batch = []
        if batch:
            yield pa.table({"text": batch}, schema=_SCHEMA)

    return _SCHEMA, tables()


def _documents(file: Path, division: Division) -> Iterator[str]:
    with open_text(file) as text:
        if division == "files":
            documents: Iterator[str] = iter([text.read()])
        else:
            documents = iter(text) if division == "lines" else _passages(text)
        yield from (document for document in documents if document.strip())


def _passages(lines: Iterator[str] | Any) -> Iterator[str]:
    passage: list[str] = []
    size = 0
    for line in lines:
        passage.append(line)
        size += len(line)
        if size >= (2 * PASSAGE if line.strip() else PASSAGE):
            yield "".join(passage)
            passage, size = [], 0
    yield "".join(passage)


@dataclass(frozen=True, kw_only=True)
class DocumentRowEncoder(RowEncoder):
    """Turns documents into blocks of tokens, every one of which is learnt once.

    A block that goes on with a document begins with the last token of the block before, which it does not learn again.

    Attributes:
        tokens: The tokenizer.
        max_length: Tokens of the longest block.
    """

    tokens: TextTokens
    max_length: int

    def settings(self) -> dict[str, Any]:
        """Return what else the result depends on."""
        return {
            "tokenizer": tokenizer_hash(self.tokens.tokenizer),
            "allow_control_tokens": self.tokens.allow_control_tokens,
            "max_length": self.max_length,
        }

    def encode_rows(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[EncodedRow]:
        """Encode documents; one longer than `max_length` becomes several blocks."""
        found: list[str | EncodedRow] = []
        for row, number in zip(rows, numbers, strict=True):
            name = self.name("text")
            try:
                text = as_text(row["text"], name)
                if not text.strip():
                    raise UnusableColumnError(name, "expected a text, got an empty field")
                found.append(text)
            except UnusableColumnError as error:
                found.append(self.skip(number, str(error), f"column {name!r} empty or no text", error))
        ids = iter(self.tokens.ids([self.tokens.plain(text) for text in found if isinstance(text, str)]))
        return [
            block for each in found for block in ([each] if isinstance(each, EncodedRow) else self._blocks(next(ids)))
        ]

    def _blocks(self, ids: list[int]) -> list[EncodedRow]:
        eos = self.tokens.tokenizer.eos_token_id
        document = [*self.tokens.bos, *ids, *([] if eos is None else [eos])]
        step = self.max_length - 1
        blocks = [document[start : start + self.max_length] for start in range(0, max(len(document) - 1, 1), step)]
        return [EncodedRow(block, [0, len(block)], "whole") for block in blocks]
