"""Folders that a command makes: never over something else, and whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_free_folder(folder: Path) -> Path:
    """Return the full path of a folder that is to be made.

    Raises:
        NotADirectoryError: It is a file.
        FileExistsError: It is not empty.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"The output {folder} is a file; expected a folder that --output may make.")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"The output folder {folder} is not empty. Choose another --output.")
    return folder


@contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes `folder`, missing parents included, in one rename when all went well."""
    home = next(parent for parent in folder.parents if parent.exists())
    new = folder.relative_to(home)
    try:
        scratch = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=home)
    except OSError as error:
        raise type(error)(
            f"Cannot write into {home}: {error.strerror}. Choose another --output, or change its permissions."
        ) from error
    with scratch:
        unfinished = Path(scratch.name) / new
        unfinished.mkdir(parents=True)
        yield unfinished
        os.replace(Path(scratch.name) / new.parts[0], home / new.parts[0])
