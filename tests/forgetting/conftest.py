"""Rows in the hub's schemas, made up, and where real data may lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

ARC_ROWS: list[dict[str, Any]] = [
    {"question": "Is ice cold?", "choices": {"text": ["yes", "no"], "label": ["1", "2"]}, "answerKey": "1"},
    {
        "question": "Which falls fastest in air?",
        "choices": {"text": ["a feather", "a stone", "dust", "smoke"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    {
        "question": "What do plants need – besides water?",
        "choices": {"text": ["light", "salt", "rock", "sand", "thé"], "label": ["A", "B", "C", "D", "E"]},
        "answerKey": "A",
    },
    {
        "question": "A thermometer measures ",
        "choices": {"text": ["speed.", "the temperature of things.", "mass."], "label": ["A", "B", "C"]},
        "answerKey": "C",
    },
]
HELLASWAG_ROWS: list[dict[str, Any]] = [
    {
        "activity_label": "Baking bread",
        "ctx_a": "A woman stands in a kitchen.",
        "ctx_b": "she",
        "endings": ["kneads the dough.", "flies  away.", "[step] Sings.", "is a car [title] Drive."],
        "label": "0",
    },
    {
        "activity_label": "Home and Garden",
        "ctx_a": "[header] How to plant a tree [title] Dig a hole. [step] Make it deep.",
        "ctx_b": "",
        "endings": ["[substeps] Use a spade.", "Use a spoon.", "Eat it.", "Sleep now."],
        "label": "3",
    },
]
WINOGRANDE_ROWS: list[dict[str, Any]] = [
    {"sentence": "Ann beat Eve at chess as _ was better.", "option1": "Ann", "option2": "Eve", "answer": "1"},
    {"sentence": "_ thanked the doctor for the cure.", "option1": "The nurse", "option2": "Sam", "answer": "2"},
]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data: $GRIT_TEST_DATA, or shared/data beside the checkout; skips where there is none."""
    given = os.environ.get("GRIT_TEST_DATA")
    folders = [Path(given)] if given else [parent / "shared" / "data" for parent in Path(__file__).resolve().parents]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        pytest.skip("no real data: set GRIT_TEST_DATA, or put them into shared/data beside the checkout")
    return found
