"""What reaches the terminal: mistakes in the input as one line, other errors as a traceback, and no noise."""

from __future__ import annotations

import dis
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]

USER_ERRORS = (ValueError, TypeError, OSError, ArithmeticError, ImportError)


def silence_known_noise() -> None:
    """Drop what Lightning says about its own internals and about other products."""
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    messages.addFilter(_is_no_advertisement)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error about the user's input as one line and exit with status 1.

    Such an error is a MisconfigurationException, or a ValueError, TypeError, OSError, ArithmeticError or ImportError that a
    `raise` statement of this package produced. Set GRIT_DEBUG=1 to see its traceback.
    """
    try:
        yield
    except Exception as error:
        cause = _user_error(error)
        if cause is None or os.environ.get("GRIT_DEBUG", "0") not in ("", "0"):
            raise
        sys.stderr.write(f"grit: error: {cause}\n")
        sys.exit(1)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("💡")


def _user_error(error: BaseException | None) -> Exception | None:
    """Return the error about the input in the chain of causes, if there is one."""
    while error is not None:
        if isinstance(error, MisconfigurationException):
            return error
        if isinstance(error, USER_ERRORS) and _raised_by_this_package(error):
            return error
        error = error.__cause__
    return None


def _raised_by_this_package(error: BaseException) -> bool:
    """Whether the traceback ends at a `raise` statement of ours, and not at an accident such as `None + 1`."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or str(place.tb_frame.f_globals.get("__name__")).partition(".")[0] != "grit_lightning":
        return False
    return place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]
