"""Zero-shot accuracy on multiple-choice benchmarks, as lm-evaluation-harness 0.4 defines it.

`acc` is how often the right option has the highest log-likelihood, `acc_norm` how often it has the highest log-likelihood
divided by its number of characters, without the space before it (the harness's `completion_len`; dividing by bytes is another
metric there, `acc_bytes`). There are no examples in the prompt and no chat template.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grit_lightning.datamodules.pipeline.sources import find_files, read_files, read_hub
from grit_lightning.errors import InvalidValueError, MissingFileError, require
from grit_lightning.forgetting.choices import SCHEMAS, ChoiceSchema, Question, Row
from grit_lightning.forgetting.held_out import HeldOutSet
from grit_lightning.forgetting.likelihood import TokenSequence
from grit_lightning.forgetting.text import encode, leading_ids


@dataclass(frozen=True)
class ChoiceQuestions(HeldOutSet):
    """Multiple-choice questions; each sequence is one option of one question, in order.

    Attributes:
        questions: The questions.
        schema: The benchmark that they come from.
    """

    unit = "question"
    questions: list[Question]
    schema: ChoiceSchema

    @property
    def metrics(self) -> tuple[str, ...]:
        """`acc`, and `acc_norm` where options differ in length."""
        return self.schema.metrics

    @property
    def weights(self) -> Tensor:
        """One for each question."""
        return torch.ones(len(self.questions), dtype=torch.float64)

    def values(self, scores: Tensor) -> dict[str, Tensor]:
        """Return 1 where the metric's favourite option is the right one, else 0; in a tie, the first is the favourite."""
        lengths = torch.tensor([length for question in self.questions for length in question.lengths])
        per_metric = {"acc": scores, "acc_norm": scores / lengths}
        return {metric: self._right(per_metric[metric]) for metric in self.metrics}

    def _right(self, scores: Tensor) -> Tensor:
        options = scores.split([len(question.pairs) for question in self.questions])
        right = [float(int(o.argmax()) == q.answer) for o, q in zip(options, self.questions, strict=True)]
        return torch.tensor(right, dtype=torch.float64)

    def describe(self, scores: Tensor) -> list[dict[str, Any]]:
        """Return the log-likelihoods of the options, the right answer, and the value of each metric."""
        options = scores.split([len(question.pairs) for question in self.questions])
        return [
            {"log_likelihoods": o.tolist(), "answer": q.answer, **line}
            for o, q, line in zip(options, self.questions, super().describe(scores), strict=True)
        ]


@dataclass(frozen=True)
class ZeroShotTask:
    """A multiple-choice benchmark.

    Attributes:
        schema: `arc_easy`, `arc_challenge`, `hellaswag` or `winogrande`: what the columns are and how a row is asked.
        source: None for the hub's table; a folder with split files; or one jsonl, json, parquet, csv or tsv file.
        name: What results are called; None for the schema's name.
        split: Split of the hub's table or of a folder.
        limit: How many questions to take from the start; None for all.
    """

    schema: str
    source: str | None = None
    name: str | None = None
    split: str = "validation"
    limit: int | None = 200

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: If the schema is unknown or the limit below 1.
        """
        require("ZeroShotTask", "schema", self.schema in SCHEMAS, f"one of {', '.join(SCHEMAS)}", self.schema)
        require("ZeroShotTask", "limit", self.limit is None or self.limit >= 1, "an integer ≥ 1 or null", self.limit)

    @property
    def label(self) -> str:
        """What results are called."""
        return self.name or self.schema

    def read(self, tokenizer: PreTrainedTokenizerBase, at_most: int | None = None) -> ChoiceQuestions:
        """Read rows as questions and tokenise them. Rows without a usable question are left out and counted in a warning.

        Args:
            tokenizer: The backbone's.
            at_most: Another bound on the number of questions, besides `limit`.

        Raises:
            FileNotFoundError: If the file or split is missing.
            ValueError: If a column is missing, or there is no usable question.
            ConnectionError: If the hub cannot be reached.
        """
        schema = SCHEMAS[self.schema]
        limit = min((bound for bound in (self.limit, at_most) if bound is not None), default=None)
        questions, broken = self._questions(schema, limit)
        left_out = f"rows left out: {len(broken)}" + (f", the first for its {broken[0]}" if broken else "")
        if not questions:
            raise InvalidValueError(
                f"{self._where}: expected usable questions, got none, {left_out}. Set `source` or `split`."
            )
        if broken:
            rank_zero_warn(f"{self._where}: {left_out}.")
        sequences = [sequence_of(tokenizer, *pair) for question in questions for pair in question.pairs]
        return ChoiceQuestions(self.label, sequences, questions, schema)

    def _questions(self, schema: ChoiceSchema, limit: int | None) -> tuple[list[Question], list[str]]:
        questions: list[Question] = []
        broken: list[str] = []
        for row in self._rows(schema):
            if len(questions) == limit:
                break
            try:
                questions.append(schema.read(row))
            except ValueError as error:
                broken.append(str(error))
        return questions, broken

    def _rows(self, schema: ChoiceSchema) -> Iterator[Row]:
        path = None if self.source is None else Path(self.source).expanduser()
        if path is None:
            table: Any = read_hub(schema.hub_id, schema.hub_config, self.split)
        elif path.suffix == ".csv" and path.is_file() and (rows := _headerless(path, schema)):
            return iter(rows)
        elif files := [path] if path.is_file() else find_files(path, self.split, schema.hub_config):
            table = read_files(files)
        else:
            raise MissingFileError(
                f"{self._where}: expected a file of split {self.split!r}, got none. Set `split`, or name the file."
            )
        if not any(set(columns) <= set(table.column_names) for columns in schema.columns):
            wanted = " or ".join(map(str, map(list, schema.columns)))
            raise InvalidValueError(
                f"{self._where}: expected the columns {wanted}, got {table.column_names}. Set `source`."
            )
        return iter(table)

    @property
    def _where(self) -> str:
        return f"Zero-shot {self.schema} ({self.source or SCHEMAS[self.schema].hub_id})"


def sequence_of(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> TokenSequence:
    """Tokenise context and continuation together, so that the continuation has the tokens that it has in running text.

    Spaces at the end of the context are moved to the continuation, where tokenizers keep them. (Both as in
    lm-evaluation-harness.)
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    lead = leading_ids(tokenizer)
    whole = lead + encode(tokenizer, kept + continuation)
    return TokenSequence(whole, max(len(lead) + len(encode(tokenizer, kept)), 1))


def _headerless(path: Path, schema: ChoiceSchema) -> list[Row] | None:
    """Return the rows of a csv file without a header; None if its first line names columns."""
    columns = schema.headerless or ()
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or len(rows[0]) != len(columns) or columns[0] in rows[0]:
        return None
    return [dict(zip(columns, [*row, *[""] * len(columns)], strict=False)) for row in rows]
