"""json and jsonl files to rows: texts as they are, and numbers as they are written.

The type of a column is decided by all of its values, not by the first ones: all true or false, all whole numbers, or text.
Among texts, and where numbers have a point or an exponent, a number is the text that stands in the file (`1.50`, `1e5`). Lists
and objects, and columns that mix them with others, stay JSON. Nothing is taken for a date.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa

from grit_lightning.datamodules.pipeline.text_files import format_of, open_text
from grit_lightning.errors import InvalidValueError

_ROWS_AT_ONCE = 1000
_INT64 = range(-(2**63), 2**63)

Kind = Literal["bool", "integer", "text", "nested"]
Row = dict[str, Any]


class _Number(str):
    """A number as it is written."""


def read_json(files: Sequence[Path]) -> tuple[pa.Schema, Iterator[pa.Table]]:
    """Read json or jsonl files, some rows at a time; twice, since the last row may decide the type of a column.

    Args:
        files: jsonl files, with an object a line, or json files, with a list of objects or also an object a line.

    Returns:
        The schema and the rows. A column that a row lacks is null there.

    Raises:
        ValueError: At once: a file is not UTF-8 or not JSON, or holds something else than objects; names file and
            line or row.
    """
    kinds: dict[str, set[Kind]] = {}
    for file in files:
        for row in _rows(file):
            for column, value in row.items():
                found = kinds.setdefault(column, set())
                if value is not None:
                    found.add(_kind(value))
    chosen = {column: _common(found) for column, found in kinds.items()}
    types = {"bool": datasets.Value("bool"), "integer": datasets.Value("int64"), "text": datasets.Value("string")}
    features = datasets.Features({column: types.get(kind) or datasets.Json() for column, kind in chosen.items()})
    return features.arrow_schema, (table for file in files for table in _tables(file, chosen, features.arrow_schema))


def _kind(value: Any) -> Kind:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, _Number):
        whole = len(value) < 20 and value.lstrip("-").isdigit() and str(int(value)) == value and int(value) in _INT64
        return "integer" if whole else "text"
    return "text" if isinstance(value, str) else "nested"


def _common(kinds: set[Kind]) -> Kind:
    return "nested" if "nested" in kinds else kinds.pop() if len(kinds) == 1 else "text"


def _rows(file: Path) -> Iterator[Row]:
    """Yield the objects of a file."""
    with open_text(file) as text:
        values = _lines(file, text) if format_of(file) == ".jsonl" else _document(file, text.read())
        for number, value in enumerate(values, start=1):
            if not isinstance(value, dict):
                raise InvalidValueError(
                    f"{file}, row {number}: expected an object with the columns of a row, such as "
                    f'{{"question": "…"}}, got {str(value)[:60]!r}. Correct the file.'
                )
            yield value


def _lines(file: Path, lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _DECODER.decode(line)
            except ValueError as error:
                raise _invalid(file, number, line, error) from error


def _document(file: Path, text: str) -> Iterable[Any]:
    """Return the elements of a list, or the objects that stand in a line each."""
    if not text.strip():
        return []
    try:
        value = _DECODER.decode(text)
        return value if isinstance(value, list) else [value]
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _lines(file, text.split("\n"))
        line = error.lineno if isinstance(error, json.JSONDecodeError) else None
        raise _invalid(file, line, text, error) from error


def _invalid(file: Path, line: int | None, document: str, error: ValueError) -> InvalidValueError:
    if not isinstance(error, json.JSONDecodeError):
        where = file if line is None else f"{file}, line {line}"
        return InvalidValueError(f"{where}: {error}. Correct the file.")
    return InvalidValueError(
        f"{file}, line {line}: expected valid JSON, got {document.rstrip()[-60:]!r}, possibly truncated ({error.msg}). "
        "Correct the file."
    )


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvalidValueError(f"expected each name once in an object, got {twice} twice")
    return found


def _constant(name: str) -> Any:
    raise InvalidValueError(
        f"expected valid JSON, got {name}, which is neither a text nor a JSON number; null is no value"
    )


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_Number, parse_float=_Number, parse_constant=_constant)


def _tables(file: Path, kinds: Mapping[str, Kind], schema: pa.Schema) -> Iterator[pa.Table]:
    batch: list[Row] = []
    done = 0
    for row in _rows(file):
        batch.append(row)
        if len(batch) == _ROWS_AT_ONCE:
            yield _table(file, batch, done, kinds, schema)
            done += len(batch)
            batch = []
    if batch:
        yield _table(file, batch, done, kinds, schema)


def _table(file: Path, rows: Sequence[Row], done: int, kinds: Mapping[str, Kind], schema: pa.Schema) -> pa.Table:
    arrays = []
    for column, kind in kinds.items():
        values = [_as_kind(row.get(column), kind) for row in rows]
        try:
            storage = pa.json_() if kind == "nested" else schema.field(column).type
            arrays.append(pa.array(values, pa.string() if kind == "nested" else storage).cast(storage))
        except UnicodeEncodeError as error:  # half of a character: JSON can write it, UTF-8 cannot
            row = done + 1 + next(i for i, value in enumerate(values) if value == error.object)
            raise InvalidValueError(
                f"{file}, row {row}: column {column!r}: expected text, got half of a surrogate pair, "
                f"{error.object[error.start]!r}. Correct the row."
            ) from error
    return pa.table(arrays, schema=schema)


def _as_kind(value: Any, kind: Kind) -> Any:
    if value is None or kind == "bool":
        return value
    if kind == "nested":
        return json.dumps(_plain(value))
    if kind == "integer":
        return int(value)
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    """Return a value in which numbers are numbers again."""
    if isinstance(value, _Number):
        return json.loads(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return {name: _plain(each) for name, each in value.items()} if isinstance(value, dict) else value
