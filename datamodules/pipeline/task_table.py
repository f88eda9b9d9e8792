"""The rows of a task's splits: found, held out where the source lacks a split, drawn, and under the task's column names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import datasets

from grit_lightning.backbones.sources import PYPI_PREFIX, package_folder
from grit_lightning.datamodules.pipeline.sources import READERS, Reader, find_files, read_hub, read_local
from grit_lightning.datamodules.pipeline.splits import draw, hold_out, select_columns
from grit_lightning.errors import InvalidValueError, MissingFileError

log = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]
PackageReader = Callable[[Path, str], datasets.Dataset | None]


class Rows(NamedTuple):
    """Rows of a split.

    Attributes:
        table: The task's columns.
        numbers: Number of each row in the source, from 0.
        where: What to call the source in messages.
        found: All columns of the source.
    """

    table: datasets.Dataset
    numbers: Sequence[int]
    where: str
    found: Sequence[str]


@dataclass(frozen=True)
class TaskTable:
    """Where the rows of a task come from.

    Attributes:
        task: Name of the task, for messages.
        source: None for the hub; a folder, a file, or pypi:<package>.
        schema: Columns of the task.
        hub_id: Name of the hub's table.
        hub_config: Its configuration, which is also the subfolder to prefer in a folder.
        hub_splits: Splits that it has, with answers; or a mapping from them to their names there.
        test_split: The split that is reported on.
        packages: Reader of each package that ships the task.
        columns: Task column → column of the source, where the names differ.
        holdout: Fraction of the training rows that stands in for each evaluation split the source lacks.
        holdout_seed: Determines which ones, alone.
        required: Columns of the schema that the source has to have; None for all.
        readers: What reads the files of an ending.
        advice: What to do where there are too few rows, for messages.
    """

    task: str
    source: str | None
    schema: Sequence[str]
    hub_id: str | None
    hub_config: str | None = None
    hub_splits: Sequence[str] | Mapping[str, str] = ("train",)
    test_split: Split = "validation"
    packages: Mapping[str, PackageReader] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    holdout: float = 0.05
    holdout_seed: int = 0
    required: Collection[str] | None = None
    readers: Mapping[str, Reader] = field(default_factory=lambda: READERS)
    advice: str = "Change `source`."

    def rows(self, split: Split, limit: int | None = None, seed: int = 0) -> Rows:
        """Read a split.

        Args:
            split: "train", "validation" or "test"; "test" stands for the split that the task is reported on.
            limit: Number of rows to draw; None for all.
            seed: Determines the draw, alone.

        Raises:
            FileNotFoundError: The source is missing, or lacks the split and training rows to stand in for it.
            ValueError: A file cannot be read, a column is missing, or there is no row.
            ConnectionError: The hub cannot be reached.
        """
        split = self.test_split if split == "test" else split
        home = split if self.has(split) else "train"
        table = self.read(home)
        if table is None:
            raise MissingFileError(
                f"{self.where(split)}: expected a source with this split or with training rows, got one without. "
                "Change `source`."
            )
        where = self.where(home)
        found = table.column_names
        table = select_columns(table, self.schema, self.columns, where, self.required)
        numbers: Sequence[int] = range(len(table))
        missing = [split for split in dict.fromkeys(("validation", self.test_split)) if not self.has(split)]
        if home == "train" and missing:
            if len(table) <= len(missing):
                raise InvalidValueError(
                    f"{where}: expected at least {len(missing) + 1} rows, one to train on and one each to hold out for "
                    f"{' and '.join(missing)}, got {len(table)}. {self.advice}"
                )
            parts = hold_out(len(table), self.holdout, self.holdout_seed, len(missing))
            numbers = parts[["train", *missing].index(split)]
            log.info("%s: %d of %d rows are the %s split", where, len(numbers), len(table), split)
        if not numbers:
            raise InvalidValueError(f"{where}: expected rows with {list(self.schema)}, got none. Change `source`.")
        numbers = [numbers[i] for i in draw(len(numbers), limit, seed)]
        return Rows(table.select(numbers), numbers, where, found)

    def read(self, split: str) -> datasets.Dataset | None:
        """Return the table of a split as the source has it, all its columns; None if it has no such split.

        Raises:
            FileNotFoundError: The source does not exist.
            ValueError: It cannot be read, or is a package that does not ship the task.
            ConnectionError: The hub cannot be reached.
        """
        if self.source is None:
            assert self.hub_id is not None  # else the task has asked for a source
            if split not in self.hub_splits:
                return None
            name = self.hub_splits[split] if isinstance(self.hub_splits, Mapping) else split
            return read_hub(self.hub_id, self.hub_config, name)
        if not self.source.startswith(PYPI_PREFIX):
            return read_local(Path(self.source).expanduser(), split, self.hub_config, self.readers)
        package = self.source.removeprefix(PYPI_PREFIX)
        if package not in self.packages:
            known = [f"{PYPI_PREFIX}{name}" for name in self.packages]
            raise InvalidValueError(
                f"source: expected one of the packages that ship {self.task}, {known}, got {self.source!r}."
            )
        return self.packages[package](package_folder(self.source, "source"), split)

    def has(self, split: str) -> bool:
        """Return whether the source has a split of its own, found out without reading a file."""
        if self.source is None:
            return split in self.hub_splits
        return bool(self._files(split)) if not self.source.startswith(PYPI_PREFIX) else self.read(split) is not None

    def where(self, split: str) -> str:
        """Return what to call a split in messages: task, split, and the file if it is a single one."""
        source = self.source or self.hub_id
        if (
            self.source is not None
            and not self.source.startswith(PYPI_PREFIX)
            and Path(self.source).expanduser().exists()
        ):
            files = self._files(split)
            source = str(files[0]) if len(files) == 1 else source
        return f"{self.task} {split} data ({source})"

    def _files(self, split: str) -> list[Path]:
        assert self.source is not None
        return find_files(Path(self.source).expanduser(), split, self.hub_config, self.readers)
