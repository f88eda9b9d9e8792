"""A row as a task's `answer` sees it: a column that is asked for is filled, and one that nobody asks for may be anything."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from grit_lightning.datamodules.pipeline.text import UnusableColumnError


class MissingColumnError(KeyError):
    """A row has no such column."""


class TaskRow(Mapping[str, Any]):
    """The values of a row under the task's column names, each checked when it is read.

    Args:
        values: Value of each column that the source has.
        optional: Columns that may be empty.
    """

    def __init__(self, values: Mapping[str, Any], optional: Collection[str] = ()) -> None:
        """Keep the values."""
        self._values = values
        self._optional = optional

    def __getitem__(self, column: str) -> Any:
        """Return the value of a column.

        Raises:
            MissingColumnError: The source has no such column.
            UnusableColumnError: It is empty, and not optional.
        """
        if column not in self._values:
            raise MissingColumnError(column)
        value = self._values[column]
        empty = value is None or (isinstance(value, str) and not value.strip())
        if empty and column not in self._optional:
            raise UnusableColumnError(column, "expected a value, got an empty field")
        return value

    def __iter__(self) -> Iterator[str]:
        """Iterate over the columns."""
        return iter(self._values)

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(self._values)
