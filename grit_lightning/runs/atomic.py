"""Files, links and folders that are whole or not there at all.

Everything is written beside its final name, under a name that starts with a dot and ends with `.unfinished`, and gets the
final name in one rename. A process that is killed at any moment leaves what was there before, and at most an unfinished file,
which the next write of the same name replaces. One process at a time may write a name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from grit_lightning.errors import FileAccessError, FileTakenError, NotAFolderError
from grit_lightning.runs.values import to_json

# Files.


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file, and flush it to disk before it gets its name.

    Args:
        path: Final name; missing folders are made.
        write: Writes the content into the open file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_names(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8."""
    write_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON; see `grit_lightning.runs.values.jsonable` for what it may hold."""
    write_text(path, to_json(value, indent=2) + "\n")


# Links.


def point_to(link: Path, name: str) -> None:
    """Make `link` a symbolic link to the file `name` beside it; a copy where links are not allowed."""
    unfinished = _unfinished(link)
    unfinished.unlink(missing_ok=True)
    try:
        os.symlink(name, unfinished)
    except OSError:  # Windows lets only few users make one
        shutil.copy(link.with_name(name), unfinished)
    os.replace(unfinished, link)
    _sync_names(link.parent)


# Folders.


def require_free_folder(folder: Path) -> Path:
    """Return the full path of a folder that is to be made.

    Raises:
        NotADirectoryError: It is a file.
        FileExistsError: It is not empty.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise NotAFolderError(
            f"--output: expected a new or an empty folder, got {folder}, which is a file. Choose another."
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise FileTakenError(
            f"--output: expected a new or an empty folder, got {folder}, which is not empty. Choose another."
        )
    return folder


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `folder`, missing parents included, when the block ends without error.

    Raises:
        OSError: Nothing can be written there.
    """
    home = _home(folder)
    new = folder.relative_to(home)
    with _scratch(folder) as scratch:
        unfinished = scratch / new
        unfinished.mkdir(parents=True)
        yield unfinished
        os.replace(scratch / new.parts[0], home / new.parts[0])


def require_writable(folder: Path) -> None:
    """Check that a folder could be made, before the work for what it is to hold is done; nothing is left behind.

    Raises:
        OSError: It could not.
    """
    with _scratch(folder):
        pass


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a folder to make, which takes the place of `folder` when the block ends without error.

    What was there stays until then, makes way in two renames, and comes back if the second one fails.

    Raises:
        OSError: Nothing can be written there.
    """
    with _scratch(folder) as scratch:
        new = scratch / folder.name
        yield new
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".before", dir=folder.parent))
        try:
            os.rename(folder, aside / folder.name)
            try:
                os.rename(new, folder)
            except BaseException:
                os.rename(aside / folder.name, folder)
                raise
        finally:
            if folder.exists():  # else all that there is of it is there
                shutil.rmtree(aside)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Make a folder beside where `folder` is to be, on the same disk, and take it away again."""
    home = _home(folder)
    try:
        scratch = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".unfinished", dir=home)
    except OSError as error:
        raise FileAccessError(
            f"--output: expected a folder that can be written, got {home}: {error.strerror}. Choose another, or change its "
            "permissions."
        ) from error
    with scratch:
        yield Path(scratch.name)


def _home(folder: Path) -> Path:
    return next(parent for parent in folder.parents if parent.exists())


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


def _sync_names(folder: Path) -> None:
    """Flush the names in a folder to disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
