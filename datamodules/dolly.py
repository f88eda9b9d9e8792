"""Dolly: 15,011 instructions written and answered by employees of Databricks (Conover et al. 2023, CC BY-SA 3.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from grit_lightning.datamodules.base import TaskDataModule
from grit_lightning.datamodules.pipeline.published import PublishedSplit
from grit_lightning.datamodules.pipeline.task_table import Split
from grit_lightning.datamodules.pipeline.text import as_text


class DollyDataModule(TaskDataModule):
    """Dolly for a causal language model, in the prompt of its authors.

    There is only a training split, parts of which become validation and test. A context that is too long loses its end.
    """

    hub_id = "databricks/databricks-dolly-15k"
    hub_splits = ("train",)
    test_split = "test"
    schema = ("instruction", "context", "response")
    default_template = "dolly"
    default_max_length = 2048
    default_invalid_rows = "skip"
    text_metrics = ("rouge", "bleu", "bertscore")
    published: ClassVar[Mapping[Split, PublishedSplit]] = {
        "train": PublishedSplit(15_011),
    }

    def answer(self, row: Mapping[str, Any]) -> str:
        """Return the column `response`."""
        return as_text(row["response"], "response")
