"""What reaches the terminal: errors about the user's input as one line, other errors as a traceback, and no noise."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]

from grit_lightning.errors import InputError


def silence_known_noise() -> None:
    """Drop what Lightning says about its own internals and about other products."""
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    messages.addFilter(_is_no_advertisement)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error about the user's input as one line and exit with status 1.

    Such an error is an `InputError`, or Lightning's MisconfigurationException. Set GRIT_DEBUG=1 to see its traceback.
    """
    try:
        yield
    except Exception as error:
        about_input = _error_about_input(error)
        if about_input is None or os.environ.get("GRIT_DEBUG", "0") not in ("", "0"):
            raise
        sys.stderr.write(f"grit: error: {about_input}\n")
        sys.exit(1)


def _error_about_input(error: BaseException | None) -> BaseException | None:
    """Return the error about the input in the chain of causes, if there is one."""
    while error is not None and not isinstance(error, InputError | MisconfigurationException):
        error = error.__cause__
    return error


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("💡")
