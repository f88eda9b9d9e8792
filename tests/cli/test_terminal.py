"""Which errors become one line: those about the user's input, and no accident.

- Every `InputError` and Lightning's MisconfigurationException are one line and exit status 1, behind their wrapping too.
- An accident keeps its traceback, whoever raises it and whatever its builtin class is.
- With GRIT_VERBOSE_ERRORS=1 a traceback follows every sentence.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]

from grit_lightning.cli.terminal import (
    one_line_errors,
    silence_known_noise,
    take_verbose_errors,
)
from grit_lightning.errors import InputError, InvalidValueError

KINDS = [InputError, *InputError.__subclasses__(), MisconfigurationException]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_about_the_input_is_one_line(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise kind("set x to 1")
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "grit: error: set x to 1\n"


def test_an_error_about_the_input_is_found_behind_its_wrapping(capsys: pytest.CaptureFixture[str]) -> None:
    def f() -> None:
        try:
            raise InvalidValueError("set x to 1")
        except ValueError as error:
            raise RuntimeError("the parser failed") from error

    with pytest.raises(SystemExit), one_line_errors():
        f()
    assert capsys.readouterr().err == "grit: error: set x to 1\n"


def fail(kind: type[Exception]) -> Callable[[], None]:
    def raise_it() -> None:
        raise kind("a defect")

    return raise_it


@pytest.mark.parametrize(
    ("accident", "kind"),
    [
        (lambda: None + 1, TypeError),
        (lambda: int("one"), ValueError),
        (fail(ValueError), ValueError),
        (fail(OSError), OSError),
        (fail(FloatingPointError), FloatingPointError),
        (fail(RuntimeError), RuntimeError),
        (fail(AssertionError), AssertionError),
    ],
)
def test_an_accident_keeps_its_traceback(accident: Callable[[], object], kind: type[Exception]) -> None:
    with pytest.raises(kind), one_line_errors():
        accident()


@pytest.mark.parametrize(("value", "shown"), [("1", InvalidValueError), ("0", SystemExit), ("", SystemExit)])
def test_a_traceback_is_shown_behind_the_sentence_if_errors_are_verbose(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, shown: type[BaseException]
) -> None:
    monkeypatch.setenv("GRIT_VERBOSE_ERRORS", value)
    with pytest.raises(shown), one_line_errors():
        raise InvalidValueError("set x to 1")
    assert capsys.readouterr().err == "grit: error: set x to 1\n"


def test_the_switch_for_verbose_errors_is_taken_out_of_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRIT_VERBOSE_ERRORS", raising=False)
    assert take_verbose_errors(["fit", "--config=demo"]) == ["fit", "--config=demo"]
    assert "GRIT_VERBOSE_ERRORS" not in os.environ
    assert take_verbose_errors(["fit", "--verbose-errors", "--config=demo"]) == ["fit", "--config=demo"]
    assert os.environ["GRIT_VERBOSE_ERRORS"] == "1"  # for the processes of this run too


@pytest.mark.parametrize("terminal", [True, False])
def test_loading_bars_are_drawn_in_a_terminal_only(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    switches = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    for switch in switches:
        monkeypatch.delenv(switch, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    silence_known_noise()
    assert [os.environ.get(switch) for switch in switches] == [None if terminal else "1"] * 3
