"""One launch of two processes for all tests of this folder, and the same runs on the process of the tests."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from filelock import FileLock

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets pass what Lightning says about toy data."""
    for item in items:
        if HERE in item.path.parents:
            for warning in (
                "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
                "ignore:The '.*_dataloader' does not have many workers",
                "ignore:Checkpoint directory .* exists and is not empty",
                "ignore:You defined a `validation_step` but have no `val_dataloader`",
            ):
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="session")
def worker() -> ModuleType:
    """The script of the two processes, as a module."""
    sys.path.insert(0, str(HERE))
    module = importlib.import_module("worker")
    sys.path.remove(str(HERE))
    return module


@pytest.fixture(scope="session")
def forked() -> Iterator[ModuleType]:
    """Starts programs with the imports done, in processes that have to find the module too."""
    sys.path.insert(0, str(HERE))
    yield importlib.import_module("forked")
    sys.path.remove(str(HERE))


@pytest.fixture(scope="session")
def results(worker: ModuleType, forked: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with what both processes have found; `found` reads it. Workers of pytest-xdist share one launch."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    out = tmp_path_factory.getbasetemp().parent / "processes" if parallel else tmp_path_factory.mktemp("processes")
    before, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    with FileLock(out.with_suffix(".lock")), contextlib.redirect_stderr(io.StringIO()):
        if not (out / "launch.log").exists():
            _launch(worker, forked, out)
    yield out
    torch.set_num_threads(threads)
    for name in set(os.environ) - set(before):
        del os.environ[name]


def _launch(worker: ModuleType, forked: ModuleType, out: Path) -> None:
    """Run all cases; what goes wrong is told by the tests of the case in which it did."""
    backbone = worker.runs.write_backbone(out / "backbone")
    worker.runs.write_backbone(out / "tied", tie_word_embeddings=True)
    worker.in_step.run_case("one-1", lambda: worker.saved_and_resumed("one", backbone, out / "one-1", 1), out)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:  # the program forks the two
        code, said = forked.run_program(
            str(HERE / "worker.py"), str(out), log=out / "said", environment=environment, patience=600
        )
        said = f"It ended with exit code {code}.\n{said}"
    except TimeoutError as error:
        said = str(error)
    (out / "launch.log").write_text(said, encoding="utf-8")


@pytest.fixture(scope="session")
def found(worker: ModuleType, results: Path) -> Callable[..., Any]:
    """Reads the result of a case on a process, and fails with the case's traceback: `found("train-ddp", 1)`."""

    def read(name: str, rank: int = 0) -> Any:
        return worker.in_step.read_result(name, results, rank)

    return read
