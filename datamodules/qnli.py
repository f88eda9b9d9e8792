"""QNLI: does a sentence answer a question? (Wang et al. 2019, CC BY-SA 4.0; 104,743 training, 5,463 validation rows)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from grit_lightning.datamodules.base import TaskDataModule
from grit_lightning.datamodules.pipeline.published import PublishedSplit
from grit_lightning.datamodules.pipeline.task_table import Split
from grit_lightning.errors import InvalidValueError


class QNLIDataModule(TaskDataModule):
    """QNLI for a causal language model, which answers " yes" or " no". Reported on validation; "yes" is positive."""

    hub_id, hub_config = "nyu-mll/glue", "qnli"
    schema = ("question", "sentence", "label")
    choices: ClassVar[list[str]] = ["no", "yes"]
    default_template = "qnli"
    default_max_length = 512
    text_metrics = ("classification",)
    published: ClassVar[Mapping[Split, PublishedSplit]] = {  # hashes of GLUE's dev.tsv, whose labels are words
        "train": PublishedSplit(104_743),
        "validation": PublishedSplit(
            5_463,
            {
                "question": "6649ed00e3e96af2a82ae208c653ad3b7bd67b5b8f6e291d930b0f3bcd0021c4",
                "sentence": "0e9e8a6832587ae422768cd42e5a6fa686f2761f28601fa56e3d699d85a208d3",
            },
        ),
    }

    def answer(self, row: Mapping[str, Any]) -> str:
        """Map the column `label` to a choice: 0 or entailment is yes, 1 or not_entailment no."""
        words = {"0": "yes", "entailment": "yes", "1": "no", "not_entailment": "no"}
        value = str(row["label"]).strip().lower()
        if value == "-1":
            raise InvalidValueError(
                "label: expected 0/1 or entailment/not_entailment, got -1, which marks a row of GLUE's test split, whose "
                "labels are not public"
            )
        if value not in words:
            raise InvalidValueError(f"label: expected 0/1 or entailment/not_entailment, got {row['label']!r}")
        return words[value]
