"""Imports run one way through the house, as CONTRIBUTING draws it: proved on the source of every module.

- a module imports only from rooms below its own, or from its own;
- `functional` imports torch and itself only, `batches` nothing of ours;
- `distributed/__init__` imports nothing, or the geometry would pull in FSDP.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "grit_lightning"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
FLOORS = (
    ("errors",),
    ("functional", "batches", "runs", "backbones", "configs", "ignored_settings", "rank_allocation"),
    ("distributed",),
    ("geometry", "accumulation_window"),
    ("optimizers", "checkpoints", "evaluation"),
    ("preflight", "optimization", "geometry_steps"),
    ("geometry_hooks",),
    ("module",),
    ("datamodules",),
    ("planning",),
    ("forgetting",),
    ("editing",),
    ("telemetry",),
    ("callbacks",),
    ("export",),
    ("studies",),
    ("cli",),
)
"""Rooms by floor, from the ground up; rooms of one floor do not know each other."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted(
    {*ROOT.rglob("*.py"), *(file for link in ROOT.iterdir() if link.is_dir() for file in link.rglob("*.py"))}
)


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module's path below the package; an empty name for the package itself."""
    return parts[0].removesuffix(".py").replace("__init__", "") if parts else ""


def imported(source: str) -> Iterator[str]:
    """Full names of all modules that a source imports, anywhere in it; `from a import b` may mean `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the house has no relative imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(source: str) -> set[str]:
    names = [name for name in imported(source) if name != f"{PACKAGE}.__version__"]  # a word, no room
    return {room_of(tuple(name.split(".")[1:])) for name in names if name.split(".")[0] == PACKAGE}


def climbing(room: str, source: str) -> set[str]:
    """What a source of a room may not import: rooms that are not below it, and the package itself."""
    return {other for other in rooms_imported(source) if other != room and FLOOR.get(other, len(FLOORS)) >= FLOOR[room]}


def test_every_room_has_its_floor() -> None:
    rooms = {room_of(path.relative_to(ROOT).parts) for path in SOURCES} - {""}
    assert rooms <= FLOOR.keys()
    assert {"callbacks", "datamodules", "configs", "functional", "module"} <= rooms  # also what is linked in


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_come_from_below(path: Path) -> None:
    room = room_of(path.relative_to(ROOT).parts)
    if room:  # the package itself re-exports from anywhere
        assert climbing(room, path.read_text(encoding="utf-8")) == set()


def test_the_formulas_know_torch_and_each_other_only() -> None:
    known = {"torch", PACKAGE, *sys.stdlib_module_names}
    for path in (ROOT / "functional").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert {name.split(".")[0] for name in imported(source)} <= known, path.name
        assert rooms_imported(source) <= {"functional"}, path.name


def test_what_a_batch_is_depends_on_nothing_of_ours() -> None:
    assert rooms_imported((ROOT / "batches.py").read_text(encoding="utf-8")) == set()


def test_distributed_imports_nothing_by_itself() -> None:
    assert list(imported((ROOT / "distributed" / "__init__.py").read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("geometry", "from grit_lightning.checkpoints.reading import read_checkpoint"),
        ("geometry", "def late():\n    from grit_lightning import callbacks"),
        ("distributed", "import grit_lightning.geometry.rank_space"),
        ("evaluation", "from grit_lightning.checkpoints import reading"),  # of the same floor
        ("checkpoints", "from grit_lightning import GritLitModule"),  # from the package, which imports everything
    ],
)
def test_an_import_from_above_would_be_found(room: str, source: str) -> None:
    assert climbing(room, source)
