"""Which rows of a table are used, and under which column names. Pure, and deterministic for a seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import datasets

from grit_lightning.datamodules.pipeline.delimited import other_separator
from grit_lightning.datamodules.pipeline.orders import shuffled
from grit_lightning.errors import InvalidValueError


def draw(rows: int, limit: int | None, seed: int) -> list[int]:
    """Draw rows without replacement; a larger limit draws a superset.

    Args:
        rows: Number of rows there are.
        limit: Number of rows to draw; None or more than there are takes all.
        seed: Determines the draw, alone.

    Returns:
        Row numbers, ascending.

    Example:
        >>> set(draw(10, 3, seed=0)) <= set(draw(10, 5, seed=0))
        True
    """
    if limit is None or limit >= rows:
        return list(range(rows))
    return sorted(shuffled(rows, seed)[:limit])


def hold_out(rows: int, fraction: float, seed: int, parts: int = 1) -> list[list[int]]:
    """Split row numbers into a part to train on and equal parts to evaluate on.

    Args:
        rows: Number of rows there are.
        fraction: Share of each part to evaluate on, which gets at least one row.
        seed: Determines the split, alone.
        parts: Number of parts to evaluate on.

    Returns:
        Ascending, disjoint lists that cover all rows: first the one to train on.

    Example:
        >>> [len(part) for part in hold_out(20, 0.1, seed=0, parts=2)]
        [16, 2, 2]
    """
    order = shuffled(rows, seed)
    size = max(1, round(rows * fraction))
    held = [sorted(order[part * size : (part + 1) * size]) for part in range(parts)]
    return [sorted(order[parts * size :]), *held]


def select_columns(
    table: datasets.Dataset,
    schema: Sequence[str],
    columns: Mapping[str, str],
    where: str,
    required: Collection[str] | None = None,
) -> datasets.Dataset:
    """Keep the columns of a task, under the task's names.

    Args:
        table: Any table.
        schema: Columns of the task.
        columns: Task column → column of the table, where the names differ.
        where: What the table is, for messages.
        required: Those of the schema that the table has to have; None for all. The others are kept if they are there.

    Raises:
        ValueError: A column is missing, or serves twice; says which, what was found, and what to change.
    """
    names = {column: columns.get(column, column) for column in schema}
    if len(set(names.values())) < len(names):
        raise InvalidValueError(
            f"{where}: expected another column for each column of the task, got {names}. Change `columns`."
        )
    found = table.column_names
    missing = [name for name in names.values() if name not in found]
    asked = schema if required is None else required
    if wanted := [name for column, name in names.items() if name in missing and column in asked]:
        raise InvalidValueError(without_columns(where, wanted, found))
    present = {column: name for column, name in names.items() if name not in missing}
    kept = table.select_columns(list(present.values()))
    return kept.rename_columns({name: column for column, name in present.items() if name != column})


def without_columns(where: str, wanted: Sequence[str], found: Sequence[str]) -> str:
    """Return the message that a table lacks columns: which, what it has, and what to change."""
    renamed = "If it has another name there, set `columns` to a mapping from the task's name to that one."
    return (
        f"{where}: expected {', '.join(map(repr, wanted))} among the columns, got {list(found)}. "
        f"{other_separator(found) or renamed}"
    )
