"""What the tests know of each task, with rows in the hub's exact schema.

A new task adds its case here: the tests of tasks, of bad input, of caches and of shipped configurations then run on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grit_lightning.datamodules import (
    AlpacaDataModule,
    BoolQDataModule,
    DollyDataModule,
    GSM8KDataModule,
    IMDbDataModule,
    QNLIDataModule,
    TaskDataModule,
)


@dataclass(frozen=True)
class TaskCase:
    """A task, its rows by number, and what is to be learnt from row n."""

    cls: type[TaskDataModule]
    row: Callable[[int], dict[str, Any]]
    learnt: Callable[[int], str]
    required: str  # a column that may not be empty
    test_on: str  # split that is reported on
    measured: tuple[str, ...]  # some of the metrics of `grit test`
    real: str | None = None  # real file, in the folder of real data


def _alpaca(n: int) -> dict[str, Any]:
    return {"instruction": f"Name {n}.", "input": f"It is {n}." if n % 2 else "", "output": f"Nr. {n}"}


def _dolly(n: int) -> dict[str, Any]:
    text = {"instruction": f"Which is {n}?", "context": f"Nr. {n} is {n}." if n % 2 else "", "response": f"The {n}th."}
    return text | {"category": "closed_qa" if n % 2 else "open_qa"}


def _gsm8k(n: int) -> dict[str, Any]:
    return {"question": f"What is {n} and 1?", "answer": f"It is {n}+1=<<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"}


ROUGE = ("rouge1", "rouge2", "rougeL")
CLASSES = ("accuracy", "f1", "generated_accuracy", "generated_f1", "unmapped")

CASES = {
    "alpaca": TaskCase(
        cls=AlpacaDataModule,
        row=_alpaca,
        learnt=lambda n: f"Nr. {n}</s>",
        required="output",
        test_on="test",
        measured=(*ROUGE, "bleu"),
        real="alpaca/alpaca_en_demo.json",
    ),
    "dolly": TaskCase(
        cls=DollyDataModule,
        row=_dolly,
        learnt=lambda n: f"The {n}th.</s>",
        required="response",
        test_on="test",
        measured=(*ROUGE, "bleu"),
        real="dolly/dolly_sample.jsonl",
    ),
    "boolq": TaskCase(
        cls=BoolQDataModule,
        row=lambda n: {"question": f"is {n} ice", "passage": f"Body {n} is cold.", "answer": n % 3 > 0},
        learnt=lambda n: " yes" if n % 3 > 0 else " no",
        required="passage",
        test_on="validation",
        measured=CLASSES,
    ),
    "imdb": TaskCase(
        cls=IMDbDataModule,
        row=lambda n: {"text": f"Part {n} is the best.<br />See it.", "label": n % 3 % 2},
        learnt=lambda n: " positive" if n % 3 == 1 else " negative",
        required="text",
        test_on="test",
        measured=CLASSES,
    ),
    "qnli": TaskCase(
        cls=QNLIDataModule,
        row=lambda n: {"question": f"What is {n}?", "sentence": f"Nr. {n}.", "label": n % 2, "idx": n},
        learnt=lambda n: " no" if n % 2 else " yes",
        required="sentence",
        test_on="validation",
        measured=CLASSES,
        real="qnli/dev.tsv",
    ),
    "gsm8k": TaskCase(
        cls=GSM8KDataModule,
        row=_gsm8k,
        learnt=lambda n: f" {_gsm8k(n)['answer']}</s>",
        required="question",
        test_on="test",
        measured=("exact_match", *ROUGE),
        real="gsm8k/test.jsonl",
    ),
}
