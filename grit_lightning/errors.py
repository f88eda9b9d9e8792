"""Errors about what the user gave: a setting, a file, a machine without the right package.

The command line shows an `InputError` as one line and everything else as a traceback. Each kind is the builtin one as well, so
that callers in Python may go on writing `except ValueError`. An invariant of ours that breaks is no `InputError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


class InputError(Exception):
    """What the user gave cannot be used; the message names what to change."""


class InvalidValueError(InputError, ValueError):
    """A setting, or the content of a file, has the right type and cannot be used."""


class InvalidTypeError(InputError, TypeError):
    """A setting has the wrong type."""


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder is not where the user said."""


class FileTakenError(InputError, FileExistsError):
    """A file or folder would be written over."""


class NotAFolderError(InputError, NotADirectoryError):
    """A file stands where a folder is expected."""


class FileAccessError(InputError, OSError):
    """A file or folder is there and cannot be read or written."""


class DownloadError(InputError, ConnectionError):
    """Something is neither on this machine nor can it be downloaded."""


class MissingPackageError(InputError, ModuleNotFoundError):
    """A Python package that the settings ask for is not installed."""


class DivergedError(InputError, FloatingPointError):
    """The training with these settings has come to NaN or infinity."""


def require(owner: str, setting: str, holds: bool, expected: str, got: object) -> None:
    """Check a setting.

    Args:
        owner: Class that has the setting.
        setting: Its name there.
        holds: Whether the value can be used.
        expected: What can be used, to be read after 'expected'.
        got: The value.

    Raises:
        InvalidValueError: It does not hold.

    Example:
        >>> require("StepTimer", "skip_steps", -1 >= 0, "an integer ≥ 0", -1)
        Traceback (most recent call last):
        grit_lightning.errors.InvalidValueError: StepTimer.skip_steps: expected an integer ≥ 0, got -1.
    """
    if not holds:
        raise InvalidValueError(f"{owner}.{setting}: expected {expected}, got {got!r}.")


def did_you_mean(given: str, known: Iterable[str], compared: Callable[[str], str] = str) -> str:
    """Return ' Did you mean `x`?' for the known name that is closest to a given one, an empty text if none is close.

    Args:
        given: What was given.
        known: What could have been meant.
        compared: What of a known name is compared with the given one; all of it if not given.

    Example:
        >>> did_you_mean("Reprojecton", ["RankAdaptation", "Reprojection"])
        ' Did you mean `Reprojection`?'
        >>> did_you_mean("GSM8K", ["BoolQDataModule", "GSM8KDataModule"])
        ' Did you mean `GSM8KDataModule`?'
        >>> did_you_mean("nonesuch", ["boolq"])
        ''
    """
    names = {compared(name).casefold(): name for name in known}
    close = difflib.get_close_matches(given.casefold(), names, n=1, cutoff=0.7)
    longer = sorted((name for name in names if len(given) > 2 and name.startswith(given.casefold())), key=len)
    found = [*close, *longer]
    return f" Did you mean `{names[found[0]]}`?" if found else ""
