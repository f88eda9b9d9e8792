"""Alpaca: 52,002 instructions answered by text-davinci-003 (Taori et al. 2023, CC BY-NC 4.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from grit_lightning.datamodules.base import TaskDataModule
from grit_lightning.datamodules.pipeline.published import PublishedSplit
from grit_lightning.datamodules.pipeline.task_table import Split
from grit_lightning.datamodules.pipeline.text import as_text


class AlpacaDataModule(TaskDataModule):
    """Alpaca for a causal language model, in the prompt of its authors.

    There is only a training split, parts of which become validation and test. Its rows without an answer are left out.
    """

    hub_id = "tatsu-lab/alpaca"
    hub_splits = ("train",)
    test_split = "test"
    schema = ("instruction", "input", "output")
    default_template = "alpaca"
    default_max_length = 2048
    default_invalid_rows = "skip"
    text_metrics = ("rouge", "bleu", "bertscore")
    published: ClassVar[Mapping[Split, PublishedSplit]] = {
        "train": PublishedSplit(52_002),
    }

    def answer(self, row: Mapping[str, Any]) -> str:
        """Return the column `output`."""
        return as_text(row["output"], "output")
