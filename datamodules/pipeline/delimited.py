r"""csv and tsv files to rows of text: what stands in a field is what is read, character for character.

There are no numbers, dates or missing values here: `007`, `1e5`, `NA` and nothing at all are texts. Fields of a csv file may
be quoted. A tsv file is quoted, as spreadsheets and pandas write it, or it is not, as GLUE's are, where a quotation mark is
one of the text; `is_quoted` tells which.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from grit_lightning.datamodules.pipeline.text_files import format_of, open_text
from grit_lightning.errors import InvalidValueError

_ROWS_AT_ONCE = 1000
_QUOTED_FIELD = re.compile(r'"[^"]*(?:""[^"]*)*"')
_QUOTED_RECORD = re.compile(rf'(?:{_QUOTED_FIELD.pattern}|[^\t"]*)(?:\t(?:{_QUOTED_FIELD.pattern}|[^\t"]*))*\n?')


def read_delimited(files: Sequence[Path]) -> tuple[pa.Schema, Iterator[pa.Table]]:
    """Read csv or tsv files with a header each, some rows at a time.

    Args:
        files: Files with the same columns, in any order.

    Returns:
        The schema, in which every column is text, and the rows.

    Raises:
        ValueError: At once or while rows are read: a file is not UTF-8, its header is unusable, or a row has more or fewer
            fields than the header, or a quotation mark where none can be; names file and row.
    """
    names = next(_records(files[0]), [])
    schema = pa.schema([(name, pa.string()) for name in _column_names(files[0], names)])
    return schema, (table for file in files for table in _tables(file, schema))


def is_quoted(lines: Iterable[str]) -> bool:
    r"""Tell whether a tsv file puts fields in quotation marks.

    It does if every quotation mark can be read that way, every row then has as many fields as the first, and at least one
    field needs its marks: the first row's, or one that holds a tab, a line end or a doubled mark. No program quotes a field and
    leaves another one with a mark of its own unquoted.

    Example:
        >>> is_quoted(["question\tlabel\n", '"say ""no"" so"\t1\n'])
        True
        >>> is_quoted(["question\tlabel\n", '"No?\t1\n', '"Yes" he said\t0\n'])
        False
    """
    needed, width = False, 0
    for record in _whole_records(lines):
        if '"' in record:
            if not _QUOTED_RECORD.fullmatch(record):
                return False
            quoted = _QUOTED_FIELD.findall(record)
            needed = needed or width == 0 or any(re.search(r'[\t\r\n]|""', field[1:-1]) for field in quoted)
        found = 1 + _QUOTED_FIELD.sub("", record).count("\t")
        width = width or found
        if found != width and record.strip():
            return False
    return needed


def other_separator(names: Sequence[str]) -> str | None:
    """Return what to do about a header that is one name because another character separates its columns, if it is."""
    glued = next((separator for separator in "\t;,|" if len(names) == 1 and separator in names[0]), None)
    if glued is None:
        return None
    return f"The header is separated by {glued!r}: name the file .tsv for tabs, or convert it to .csv with commas."


def _whole_records(lines: Iterable[str]) -> Iterator[str]:
    """Join lines until their quotation marks are even, so that no quoted line end tears a record."""
    parts: list[str] = []
    marks = 0
    for line in lines:
        parts.append(line)
        marks += line.count('"')
        if marks % 2 == 0:
            yield "".join(parts).replace("\r\n", "\n")
            parts, marks = [], 0
    if parts:
        yield "".join(parts)


def _records(file: Path) -> Iterator[list[str]]:
    """Yield the fields of each row that is not blank, the header first."""
    options: dict[str, object] = {"strict": True}
    if format_of(file) == ".tsv":
        with open_text(file) as lines:
            quoted = is_quoted(lines)
        options |= {"delimiter": "\t", "quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE}
    with open_text(file) as lines, _fields_of_any_length():
        reader = csv.reader(lines, **options)  # type: ignore[arg-type]
        row = 0
        try:
            for fields in reader:
                if fields:
                    yield fields
                    row += 1
        except csv.Error as error:
            where = f"row {row}" if row else "header"
            raise InvalidValueError(
                f"{file}, {where} (line {reader.line_num}): expected fields that hold quotation marks and line ends in "
                f'quotation marks, such as "say ""no""", got one that does not ({error}). Correct the row.'
            ) from error


def _tables(file: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    records = _records(file)
    names = _column_names(file, next(records, []))
    if set(names) != set(schema.names):
        raise InvalidValueError(
            f"{file}: expected the columns of the split's first file, {schema.names}, got {names}. Correct its header."
        )
    batch: list[list[str]] = []
    for row, fields in enumerate(records, start=1):
        if len(fields) != len(names):
            advice = "Correct the row, and put fields that hold the separator in quotation marks."
            raise InvalidValueError(
                f"{file}, row {row}: expected {len(names)} fields, as in the header, got {len(fields)}: {str(fields)[:80]}. "
                f"{other_separator(names) or advice}"
            )
        batch.append(fields)
        if len(batch) == _ROWS_AT_ONCE:
            yield _table(names, batch, schema)
            batch = []
    if batch:
        yield _table(names, batch, schema)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], schema: pa.Schema) -> pa.Table:
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    return pa.table([pa.array(columns[name], pa.string()) for name in schema.names], schema=schema)


def _column_names(file: Path, names: Sequence[str]) -> list[str]:
    """Return the names of a header; a column without one (pandas' index) gets the name that pandas gives it."""
    named = [name if name.strip() else f"Unnamed: {index}" for index, name in enumerate(names)]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise InvalidValueError(
            f"{file}: expected another name for each column, got {twice} twice. Correct its header."
        )
    return named


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Lift the limit of Python's csv module, 128 KiB a field, which is one for the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
