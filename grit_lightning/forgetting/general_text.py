"""General text as rows: what stands for all that an adapter's backbone can do, for statistics and for held-out losses.

A text becomes full blocks: its documents are drawn in the order of a seed, joined with the end-of-sequence token, and cut. A
conversation stays a row, in which the assistant's turns count. Calibration and held-out rows come from different documents.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any, NamedTuple, NoReturn

from transformers import PreTrainedTokenizerBase

from grit_lightning.datamodules import TextDataModule
from grit_lightning.datamodules.pipeline.orders import shuffled
from grit_lightning.datamodules.pipeline.task_table import Rows
from grit_lightning.errors import InvalidValueError
from grit_lightning.forgetting.general_source import GeneralText, OpenText, open_text
from grit_lightning.forgetting.text import full_pieces

Row = dict[str, list[int]]
"""`input_ids`, and `learnt`: where what counts begins and ends, start, end, start, end …"""

BLOCK_SIZE, CALIBRATION_BLOCKS, HELD_OUT_BLOCKS = 256, 48, 24
_READ_AT_ONCE = 16  # documents
_TAKEN = ("task", "self")  # names of what stands beside general text in results


class GeneralRows(NamedTuple):
    """The rows of a source.

    Attributes:
        calibration: Rows to take statistics from.
        held_out: Rows of other documents, to measure on.
        weight: The source's part beside others.
        remark: What was read, in words.
    """

    calibration: list[Row]
    held_out: list[Row]
    weight: float = 1.0
    remark: str = ""


def read_general(
    sources: Sequence[GeneralText],
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int = BLOCK_SIZE,
    calibration: int = CALIBRATION_BLOCKS,
    held_out: int = HELD_OUT_BLOCKS,
    seed: int = 0,
) -> dict[str, GeneralRows]:
    """Read general text into rows, no document of which is on both sides, in whatever source it stands.

    Where a source has splits for training and validation, calibration rows are from the one and held-out rows from the other;
    otherwise documents are divided by the seed. Rows that cannot be used are left out.

    Args:
        sources: Where from.
        tokenizer: The backbone's.
        block_size: Tokens of a block, and the most tokens of a conversation.
        calibration: Blocks or conversations to take statistics from, of each source; fewer where there are no more.
        held_out: As many to measure on.
        seed: Determines which documents are taken, and what for.

    Returns:
        Rows by the source's label, which gets a number where two have the same.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A source has neither text nor conversations, or too few documents for both sides.
        ConnectionError: The hub cannot be reached.
    """
    share = held_out / (calibration + held_out)
    opened = {
        name: _Source(open_text(source, tokenizer, block_size, share, seed), seed)
        for name, source in _named(sources).items()
    }
    used: set[str] = set()
    first = {name: source.calibration(calibration, used) for name, source in opened.items()}
    return {name: source.with_held_out(first[name], source.held_out(held_out, used)) for name, source in opened.items()}


def _named(sources: Sequence[GeneralText]) -> dict[str, GeneralText]:
    named: dict[str, GeneralText] = {}
    for source in sources:
        names = chain([source.label], (f"{source.label}{number}" for number in count(2)))
        named[next(name for name in names if name not in (*named, *_TAKEN))] = source
    return named


@dataclass(frozen=True)
class _Source:
    """Makes rows of a source that is opened; both sides are to be made of all sources with the same `used`.

    Attributes:
        opened: What reads it, and its documents on both sides.
        seed: Determines the order of its documents.
    """

    opened: OpenText
    seed: int

    def calibration(self, wanted: int, used: set[str]) -> list[Row]:
        """Take rows for statistics, and add their documents to those that are used."""

        def documents() -> Iterator[_Document]:
            for document in self._drawn(self.opened.for_calibration):
                used.add(document.content)
                yield document

        rows = list(islice(self._rows(documents(), self.opened.for_calibration), wanted))
        return rows or self._refuse("calibration", self._drawn(self.opened.for_calibration))

    def held_out(self, wanted: int, used: Collection[str]) -> list[Row]:
        """Take rows to measure on, of documents that are not used."""

        def documents() -> Iterator[_Document]:
            return (each for each in self._drawn(self.opened.for_measuring) if each.content not in used)

        rows = list(islice(self._rows(documents(), self.opened.for_measuring), wanted))
        shared = len(self.opened.for_measuring.table) - sum(1 for _ in documents()) if not rows else 0
        return rows or self._refuse("held-out", documents(), shared)

    def with_held_out(self, calibration: list[Row], held_out: list[Row]) -> GeneralRows:
        """Put both sides together, and say what was read."""
        what = "blocks" if self._is_text else "conversations"
        sizes = [
            f"{len(rows):,} {what} ({sum(len(row['input_ids']) for row in rows):,} tokens)"
            for rows in (calibration, held_out)
        ]
        remark = f"{sizes[0]}, {sizes[1]} of other documents held out"
        return GeneralRows(calibration, held_out, self.opened.text.weight, remark)

    def _drawn(self, side: Rows) -> Iterator[_Document]:
        for index in shuffled(len(side.table), self.seed):
            row = side.table[index]
            yield _Document(row, side.numbers[index], repr(sorted(row.items())))

    def _rows(self, documents: Iterator[_Document], side: Rows) -> Iterator[Row]:
        return self._blocks(documents) if self._is_text else self._conversations(documents, side)

    def _blocks(self, documents: Iterable[_Document]) -> Iterator[Row]:
        lead = self.opened.module.tokens.bos
        for piece in full_pieces(self._encoded(documents), self.opened.module.max_length - len(lead)):
            yield {"input_ids": lead + piece, "learnt": [len(lead), len(lead) + len(piece)]}

    def _encoded(self, documents: Iterable[_Document]) -> Iterator[list[int]]:
        tokens, eos = self.opened.module.tokens, self.opened.module.tokenizer.eos_token_id
        for row, _, _ in documents:
            if isinstance(row["text"], str) and row["text"].strip():
                yield tokens.ids([tokens.plain(row["text"])])[0] + ([] if eos is None else [eos])

    def _conversations(self, documents: Iterator[_Document], side: Rows) -> Iterator[Row]:
        encoder = self.opened.module.row_encoder(side, self.opened.module.max_length)
        while batch := list(islice(documents, _READ_AT_ONCE)):
            for row in encoder.encode_rows([each.row for each in batch], [each.number for each in batch]):
                if row.learnt:
                    yield {"input_ids": row.input_ids, "learnt": row.learnt}

    def _refuse(self, what: str, documents: Iterator[_Document], shared: int = 0) -> NoReturn:
        """Say how much there is where it makes no row."""
        longest, given = self.opened.module.max_length, list(documents)
        if self._is_text:
            wanted = f"a block of {longest} tokens"
            got = f"{sum(map(len, self._encoded(given))):,} tokens in {len(given):,} document{'' if len(given) == 1 else 's'}"
        else:
            wanted = f"a conversation of at most {longest} tokens with an answer"
            got = f"{len(given):,} conversations that are none"
        also = f", beside {shared:,} that are among the calibration rows" if shared else ""
        raise InvalidValueError(
            f"General text ({self.opened.text.source}): expected {wanted} for {what} rows, got {got}{also}. Give more text, or "
            "change the block size."
        )

    @property
    def _is_text(self) -> bool:
        return isinstance(self.opened.module, TextDataModule)


class _Document(NamedTuple):
    """A document or a conversation: its columns, its number in the source, and what others are compared with."""

    row: Mapping[str, Any]
    number: int
    content: str
