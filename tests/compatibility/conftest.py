"""Compares what comes of a case with its row in docs/compatibility.md, or writes the row."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from . import page
from .cases import Case
from .running import outcome
from .tiny_models import TinyModels

Compare = Callable[[str, Sequence[Case], Case], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-compatibility", action="store_true", help="write docs/compatibility.md instead of comparing with it"
    )


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """Leave nothing of a distributed strategy behind: a process that is forked later would take itself for a member."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture
def compare(request: pytest.FixtureRequest, tiny_models: TinyModels, tmp_path: Path) -> Compare:
    """`compare(section, cases, case)` runs the case and holds what comes of it against the page."""

    def check(section: str, cases: Sequence[Case], case: Case) -> None:
        if missing := _missing(case.needs):
            pytest.skip(f"needs {missing}; the page keeps its row")
        writes = request.config.getoption("--write-compatibility", default=False)
        if case.slow and not writes:
            pytest.skip("takes long: its row is made only when the page is written")
        found = outcome(case, tiny_models, tmp_path)
        if writes:
            page.write_row(section, [each.name for each in cases], case.name, found)
        written = page.rows(section)[case.name]
        assert page.comparable(found) == page.comparable(written), page.cells(found)

    return check


def _missing(needs: str) -> str:
    """Return what a case needs and is not installed."""
    package, _, attribute = needs.partition(":")
    try:
        found = importlib.import_module(package) if package else None
        return needs if attribute and not hasattr(found, attribute) else ""
    except ImportError:
        return package
