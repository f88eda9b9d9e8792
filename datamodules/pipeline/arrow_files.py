"""Columns on disk: parquet files as they are read, and the memory-mapped files that every kind of source ends in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from grit_lightning.errors import InvalidValueError
from grit_lightning.runs.atomic import write_file

_ROWS_AT_ONCE = 1000


def write_table(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema as one, whole or, if one of them cannot be read, not at all."""

    def write(file: BinaryIO) -> None:
        with pa.ipc.new_stream(file, schema) as stream:
            for table in tables:
                stream.write_table(table)

    write_file(path, write)


def read_parquet(files: Sequence[Path]) -> tuple[pa.Schema, Iterator[pa.Table]]:
    """Read parquet files, some rows at a time.

    Args:
        files: Files with the same columns, in any order.

    Returns:
        The schema of the first, in which categories are their values, and the rows.

    Raises:
        ValueError: At once or while rows are read: a file is not parquet, or has other columns than the first.
    """
    schema = _open(files[0]).schema_arrow
    for index, field in enumerate(schema):
        if pa.types.is_dictionary(field.type):  # pandas' categories
            schema = schema.set(index, field.with_type(field.type.value_type))
    return schema, (table for file in files for table in _tables(file, schema))


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise InvalidValueError(f"{file}: expected a parquet file, got {error}. Copy it again.") from error


def _tables(file: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    content = _open(file)
    names = content.schema_arrow.names
    if sorted(names) != sorted(schema.names):
        raise InvalidValueError(
            f"{file}: expected the columns of the split's first file, {schema.names}, got {names}. Change `source`."
        )
    try:
        for batch in content.iter_batches(_ROWS_AT_ONCE):
            table = pa.Table.from_batches([batch]).select(schema.names)
            yield table if table.schema.equals(schema) else table.cast(schema)
    except (pa.ArrowException, OSError) as error:
        raise InvalidValueError(
            f"{file}: expected rows of the types {dict(zip(schema.names, map(str, schema.types), strict=True))}, got {error}. "
            "Correct the file."
        ) from error
