"""Errors about the user's input: each kind is the builtin one too, and the package raises no builtin one in its place.

`functional/` is left out: its callers have checked the user's settings, so that its ValueErrors tell of a defect.
"""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

from grit_lightning.errors import InputError, InvalidValueError, require

ROOT = Path(__file__).resolve().parents[1]
KINDS = InputError.__subclasses__()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_a_builtin_one_with_the_same_message(kind: type[InputError]) -> None:
    builtin = kind.__bases__[1]
    assert builtin.__module__ == "builtins"
    with pytest.raises(builtin) as caught:
        raise kind("set x to 1")
    assert str(caught.value) == "set x to 1"
    assert str(pickle.loads(pickle.dumps(caught.value))) == "set x to 1"  # as it comes from another process


def test_a_setting_that_does_not_hold_is_named_with_what_was_expected() -> None:
    require("StepTimer", "skip_steps", True, "an integer ≥ 0", 0)
    with pytest.raises(InvalidValueError) as caught:
        require("RunRecord", "table", False, "fit_end or never", "sometimes")
    assert str(caught.value) == "RunRecord.table: expected fit_end or never, got 'sometimes'."


def raised(path: Path) -> list[str]:
    """Names of the classes that a file raises."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    calls = (node.exc for node in nodes if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call))
    return [ast.unparse(call.func) for call in calls]


@pytest.fixture(scope="module")
def raised_by_file() -> dict[str, list[str]]:
    files = [
        path for folder in ("grit_lightning", "callbacks", "datamodules") for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 50
    return {str(path.relative_to(ROOT)): raised(path) for path in files if "functional" not in path.parts}


def test_what_the_user_can_change_is_raised_as_an_input_error(raised_by_file: dict[str, list[str]]) -> None:
    builtin = {kind.__bases__[1].__name__ for kind in KINDS} | {"ImportError", "type(error)"}
    assert {name: kinds for name, kinds in raised_by_file.items() if set(kinds) & builtin} == {}


def test_every_kind_is_raised_somewhere(raised_by_file: dict[str, list[str]]) -> None:
    assert {kind.__name__ for kind in KINDS} <= {name for kinds in raised_by_file.values() for name in kinds}
