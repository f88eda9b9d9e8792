"""Rows of ARC, HellaSwag and WinoGrande as multiple-choice questions, written as lm-evaluation-harness 0.4 writes them.

A question is a list of (context, continuation) pairs, one per option; the model answers with the option whose continuation
it finds most likely. WinoGrande uses partial evaluation: the options go into the context, and the text after them, which is
the same for all, is the continuation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from grit_lightning.errors import InvalidValueError

Row = Mapping[str, Any]

ARC_CSV = ("question", "A", "B", "C", "D", "answerKey")
"""Columns of the tables of ARC that come without a header."""


class Question(NamedTuple):
    """One multiple-choice question.

    Attributes:
        pairs: (context, continuation) of each option; a continuation starts with a space.
        lengths: Number of characters of each option, by which `acc_norm` divides log-likelihoods.
        answer: Index of the right option.
    """

    pairs: list[tuple[str, str]]
    lengths: list[int]
    answer: int


@dataclass(frozen=True)
class ChoiceSchema:
    """How a benchmark's rows become questions.

    Attributes:
        read: Row → question; raises ValueError for a row without a usable one.
        columns: Alternative sets of columns that `read` understands, the hub's first.
        hub_id: Table on the hub.
        hub_config: Its configuration.
        metrics: `acc`: argmax of log-likelihood; `acc_norm`: of log-likelihood over characters of the option.
        headerless: Columns of files that have no header, if there are such files.
    """

    read: Callable[[Row], Question]
    columns: tuple[tuple[str, ...], ...]
    hub_id: str
    hub_config: str | None = None
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    headerless: tuple[str, ...] | None = None


def arc_question(row: Row) -> Question:
    r"""Read a question of ARC: a science question with three to five options, labelled A to E or 1 to 5.

    Args:
        row: `question`, `answerKey`, and `choices` (with `text` and `label`, as on the hub) or a column for each option,
            named A, B, C, D, of which the last may be empty.

    Raises:
        ValueError: If there are fewer than two options, one is blank, or the key is not one of their labels.

    Example:
        >>> choices = {"text": ["yes", "no"], "label": ["1", "2"]}
        >>> arc_question({"question": "Is ice cold?", "choices": choices, "answerKey": "1"}).pairs
        [('Question: Is ice cold?\nAnswer:', ' yes'), ('Question: Is ice cold?\nAnswer:', ' no')]
    """
    if "choices" in row:
        texts, labels = list(row["choices"]["text"]), list(row["choices"]["label"])
    else:
        labels = [label for label in "ABCDE" if row.get(label)]
        texts = [str(row[label]) for label in labels]
    return _question(f"Question: {row['question']}\nAnswer:", texts, labels, row["answerKey"])


def hellaswag_question(row: Row) -> Question:
    """Read a question of HellaSwag: which of four endings continues a description; WikiHow's bracketed headings are dropped.

    Args:
        row: `activity_label`, `ctx_a`, `ctx_b`, `endings` and `label`, the index of the right ending.

    Raises:
        ValueError: If an ending is empty, or the label is missing, as in the test split.
    """
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [_without_headings(ending) for ending in row["endings"]]
    labels = [str(index) for index in range(len(endings))]
    return _question(_without_headings(context), endings, labels, row["label"])


def winogrande_question(row: Row) -> Question:
    """Read a question of WinoGrande: which of two names the blank of a sentence stands for.

    Args:
        row: `sentence` with a `_`, `option1`, `option2` and `answer`, "1" or "2".

    Raises:
        ValueError: If there is no blank, no text after it, an empty option, or no answer, as in the test split.

    Example:
        >>> row = {"sentence": "Ann beat Eve as _ was fast.", "option1": "Ann", "option2": "Eve", "answer": "1"}
        >>> winogrande_question(row).pairs
        [('Ann beat Eve as Ann', ' was fast.'), ('Ann beat Eve as Eve', ' was fast.')]
    """
    head, blank, tail = str(row["sentence"]).partition("_")
    options = [str(row["option1"] or ""), str(row["option2"] or "")]
    if not blank or not tail.strip():
        raise InvalidValueError(f"sentence: expected a blank '_' followed by text, got {row['sentence']!r}")
    question = _question("", options, ["1", "2"], row["answer"])
    return question._replace(pairs=[(head + option, f" {tail.strip()}") for option in options])


SCHEMAS: Mapping[str, ChoiceSchema] = {
    f"arc_{level}": ChoiceSchema(
        arc_question,
        (("question", "choices", "answerKey"), ARC_CSV),
        "allenai/ai2_arc",
        f"ARC-{level.capitalize()}",
        headerless=ARC_CSV,
    )
    for level in ("easy", "challenge")
} | {
    "hellaswag": ChoiceSchema(
        hellaswag_question, (("activity_label", "ctx_a", "ctx_b", "endings", "label"),), "Rowan/hellaswag"
    ),
    "winogrande": ChoiceSchema(
        winogrande_question,
        (("sentence", "option1", "option2", "answer"),),
        "allenai/winogrande",
        "winogrande_xl",
        metrics=("acc",),  # the continuation is the same for both options
    ),
}


def _question(context: str, options: list[str], labels: list[str], key: Any) -> Question:
    if len(options) < 2 or not all(option.strip() for option in options):
        raise InvalidValueError(f"options: expected at least two and none of them blank, got {options}")
    if str(key).strip() not in labels:
        raise InvalidValueError(f"answer: expected one of {labels}, got {key!r}")
    pairs = [(context, f" {option}") for option in options]
    return Question(pairs, [len(option) for option in options], labels.index(str(key).strip()))


def _without_headings(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
