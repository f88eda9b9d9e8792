"""What reaches the terminal: errors about the user's input as one sentence, other errors as a traceback, and no noise."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from grit_lightning.errors import InputError

VERBOSE_ERRORS = "--verbose-errors"
_VERBOSE = "GRIT_VERBOSE_ERRORS"
_QUIET_LOADING = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def silence_known_noise() -> None:
    """Drop what Lightning says about its own internals and about other products, and loading bars where nobody watches.

    The libraries read whether they may draw bars when they are imported: call it before.
    """
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    messages.addFilter(_is_no_advertisement)
    if not sys.stderr.isatty():
        for switch in _QUIET_LOADING:
            os.environ.setdefault(switch, "1")


def take_verbose_errors(words: Sequence[str]) -> list[str]:
    """Return the words without `--verbose-errors`, which switches it on for this process and those that it starts."""
    if VERBOSE_ERRORS in words:
        os.environ[_VERBOSE] = "1"
    return [word for word in words if word != VERBOSE_ERRORS]


def errors_are_verbose() -> bool:
    """Whether everything that is known of an error is shown: `--verbose-errors`, or GRIT_VERBOSE_ERRORS=1."""
    return os.environ.get(_VERBOSE, "0") not in ("", "0")


def usage_error(sentence: str, more: str = "", everything: str = "") -> NoReturn:
    """Say what is wrong with the command line, and exit with status 2.

    Args:
        sentence: What is wrong and what to change.
        more: A line that helps, a list of names say.
        everything: What the parser itself has to say; shown if errors are verbose.
    """
    sys.stderr.write(f"grit: error: {sentence}\n")
    if more:
        sys.stderr.write(f"{more}\n")
    if everything and errors_are_verbose():
        sys.stderr.write(f"{everything}\n")
    sys.exit(2)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error about the user's input as one line and exit with status 1.

    Such an error is an `InputError`, or Lightning's MisconfigurationException. If errors are verbose, its traceback follows.
    """
    try:
        yield
    except Exception as error:
        about_input = _error_about_input(error)
        if about_input is None:
            raise
        sys.stderr.write(f"grit: error: {about_input}\n")
        if errors_are_verbose():
            raise
        sys.exit(1)


def _error_about_input(error: BaseException | None) -> BaseException | None:
    """Return the error about the input in the chain of causes, if there is one."""
    raisers = sys.modules.get(
        "lightning.fabric.utilities.exceptions"
    )  # if it was never imported, it has raised nothing
    kinds = (InputError,) if raisers is None else (InputError, raisers.MisconfigurationException)
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__
    return error


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("💡")
