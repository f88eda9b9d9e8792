r"""Text files as they stand on disk: UTF-8 with or without a byte-order mark, plain or compressed by gzip, line by line.

Only a line feed ends a line here. What is left of `\r\n`, and a carriage return within a text, is for the format to judge.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from grit_lightning.errors import InvalidValueError

PLAIN_TEXT = (".txt", ".md")
"""Endings of files that are nothing but text."""

_GZIP = b"\x1f\x8b"


def format_of(file: Path) -> str:
    """Return the ending that says what a file holds, such as `.jsonl`, also of `train.jsonl.gz`."""
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix


@contextmanager
def open_bytes(file: Path) -> Iterator[IO[bytes]]:
    """Open a file to read bytes, through gzip if it is compressed, whatever its name."""
    with file.open("rb") as plain:
        packed = plain.read(2) == _GZIP
        plain.seek(0)
        if not packed:
            yield plain
            return
        try:
            with gzip.open(plain) as unpacked:
                yield unpacked  # type: ignore[misc]  # reads bytes like any file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InvalidValueError(f"{file}: expected a whole gzip file, got {error}. Copy it again.") from error


@contextmanager
def open_text(file: Path) -> Iterator[IO[str]]:
    """Open a file to read text, lines with their ends.

    Raises:
        ValueError: It is not UTF-8.
    """
    try:
        with open_bytes(file) as content, io.TextIOWrapper(content, "utf-8-sig", newline="\n") as text:
            yield text
    except UnicodeDecodeError as error:
        raise InvalidValueError(
            f"{file}: expected text in UTF-8, got the byte 0x{error.object[error.start]:02x}. Save the file as UTF-8."
        ) from error


def files_hash(files: Sequence[Path]) -> str:
    """Return a hash of the contents of files, in their order, whatever their names and times."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
        digest.update(b"%d" % file.stat().st_size)  # else a line could move from one file to the next unseen
    return digest.hexdigest()
