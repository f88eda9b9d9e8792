"""Which errors become one line: those that this package raised about its input, and no accident."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]

from grit_lightning.cli.terminal import one_line_errors


def inside_the_package(source: str) -> Callable[[], None]:
    """A function `f` as if it stood in a module of the package."""
    names: dict[str, object] = {"__name__": "grit_lightning.somewhere"}
    exec(source, names)
    function = names["f"]
    assert callable(function)
    return function


@pytest.mark.parametrize("kind", ["ValueError", "TypeError", "FileExistsError", "FloatingPointError"])
def test_an_error_raised_by_the_package_is_one_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    f = inside_the_package(f"def f():\n    raise {kind}('set x to 1')")
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        f()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "grit: error: set x to 1\n"


def test_an_error_raised_by_the_package_is_found_behind_its_wrapping(capsys: pytest.CaptureFixture[str]) -> None:
    f = inside_the_package(
        """
def f():
    try:
        raise ValueError('set x to 1')
    except ValueError as error:
        raise RuntimeError('the parser failed') from error
"""
    )
    with pytest.raises(SystemExit), one_line_errors():
        f()
    assert capsys.readouterr().err == "grit: error: set x to 1\n"


def test_lightnings_verdict_on_the_configuration_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), one_line_errors():
        raise MisconfigurationException("no such accelerator")
    assert capsys.readouterr().err == "grit: error: no such accelerator\n"


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("def f():\n    return None + 1", TypeError),
        ("def f():\n    return int('one')", ValueError),
        ("def f():\n    raise RuntimeError('a defect')", RuntimeError),
        ("def f():\n    assert False", AssertionError),
    ],
)
def test_an_accident_keeps_its_traceback(source: str, kind: type[Exception]) -> None:
    f = inside_the_package(source)
    with pytest.raises(kind), one_line_errors():
        f()


def test_errors_of_other_packages_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="theirs"), one_line_errors():
        raise ValueError("theirs")
