"""Rows become the questions that lm-evaluation-harness makes of them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from grit_lightning.forgetting.choices import SCHEMAS, arc_question, hellaswag_question, winogrande_question

from .conftest import ARC_ROWS, HELLASWAG_ROWS, WINOGRANDE_ROWS


@pytest.mark.parametrize("row", ARC_ROWS)
def test_arc_of_the_hub(row: dict[str, Any]) -> None:
    question = arc_question(row)
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    assert question.pairs == [(f"Question: {row['question']}\nAnswer:", f" {text}") for text in texts]
    assert question.lengths == [len(text) for text in texts]
    assert labels[question.answer] == row["answerKey"]


def test_arc_with_a_column_an_option_is_the_same_question() -> None:
    for row in ARC_ROWS[1:]:
        flat = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
        columns = {"A": "", "B": "", "C": "", "D": ""} | flat
        assert arc_question({"question": row["question"], "answerKey": row["answerKey"], **columns}) == arc_question(
            row
        )


def test_hellaswag_drops_headings() -> None:
    first, second = map(hellaswag_question, HELLASWAG_ROWS)
    assert first.pairs[0] == ("Baking bread: A woman stands in a kitchen. She", " kneads the dough.")
    assert [continuation for _, continuation in first.pairs[1:]] == [" flies away.", "  Sings.", " is a car. Drive."]
    assert first.lengths[0] == len("kneads the dough.")
    assert second.pairs[1][0] == "Home and Garden: How to plant a tree. Dig a hole. Make it deep."
    assert (first.answer, second.answer) == (0, 3)


def test_winogrande_scores_what_follows_the_blank() -> None:
    first, second = map(winogrande_question, WINOGRANDE_ROWS)
    assert first.pairs == [
        ("Ann beat Eve at chess as Ann", " was better."),
        ("Ann beat Eve at chess as Eve", " was better."),
    ]
    assert [context for context, _ in second.pairs] == ["The nurse", "Sam"]
    assert (first.answer, second.answer) == (0, 1)


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (arc_question, ARC_ROWS[0] | {"answerKey": "5"}, r"answer: expected one of \[.*\], got '5'"),
        (
            arc_question,
            {"question": "?", "A": "", "B": "", "C": "", "D": "", "answerKey": "3"},
            "options: expected at least two",
        ),
        (arc_question, {"question": "?", "A": "x", "B": " ", "C": "", "D": "", "answerKey": "A"}, "none of them blank"),
        (hellaswag_question, HELLASWAG_ROWS[0] | {"label": ""}, r"answer: expected one of \[.*\], got ''"),
        (hellaswag_question, HELLASWAG_ROWS[0] | {"endings": ["[step]", "a", "b", "c"]}, "none of them blank"),
        (winogrande_question, WINOGRANDE_ROWS[0] | {"answer": ""}, r"answer: expected one of \[.*\], got ''"),
        (
            winogrande_question,
            WINOGRANDE_ROWS[0] | {"sentence": "There is none."},
            "sentence: expected a blank '_' followed by text, got",
        ),
        (
            winogrande_question,
            WINOGRANDE_ROWS[0] | {"sentence": "At the end _"},
            "sentence: expected a blank '_' followed by text, got",
        ),
    ],
)
def test_rows_without_a_usable_question_say_why(read: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(row)


def test_the_harness_writes_hellaswag_and_winogrande_the_same_way() -> None:
    hellaswag = pytest.importorskip("lm_eval.tasks.hellaswag.utils", reason="lm-eval is not installed")
    from lm_eval.tasks.winogrande import preprocess_winogrande as winogrande

    for row in HELLASWAG_ROWS:
        question = hellaswag_question(row)
        context = row["ctx_a"] + " " + row["ctx_b"].capitalize()
        assert question.pairs[0][0] == hellaswag.preprocess(f"{row['activity_label']}: {context}")
        assert [c for _, c in question.pairs] == [f" {hellaswag.preprocess(ending)}" for ending in row["endings"]]
    for row in WINOGRANDE_ROWS:
        question = winogrande_question(row)
        contexts, target = winogrande.doc_to_choice(row), winogrande.doc_to_target(row)
        assert question.pairs == [(context, f" {target}") for context in contexts]
        assert question.answer == winogrande.doc_to_text(row)


@pytest.mark.parametrize("level", ["easy", "challenge"])
def test_real_arc_rows_are_read_but_for_those_without_options(level: str, real_data: Path) -> None:
    with (real_data / "arc" / f"arc_{level}_dev.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    columns = SCHEMAS[f"arc_{level}"].headerless
    assert columns is not None
    read = 0
    for row in rows:
        try:
            question = arc_question(dict(zip(columns, row, strict=True)))
        except ValueError:
            assert not all(row[1:5]) or row[5] == "E"  # the file left the options, or the fifth of them, out
        else:
            read += 1
            assert question.pairs[question.answer][1] == f" {row['ABCD'.index(row[5]) + 1]}"
    assert read > 0.95 * len(rows)
