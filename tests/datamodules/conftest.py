"""BoolQ rows in the hub's exact schema, and a datasets cache that each test has for itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture
def boolq_rows() -> Callable[..., Rows]:
    """A factory of rows with question (str), passage (str) and answer (bool), all different."""

    def make(count: int, first: int = 0, passage: str = "Body {} is cold.") -> Rows:
        numbers = range(first, first + count)
        return [{"question": f"is {n} ice", "passage": passage.format(n), "answer": n % 3 > 0} for n in numbers]

    return make


@pytest.fixture
def write_jsonl() -> Callable[[Path, Rows], Path]:
    """Writes rows one a line and returns the path."""

    def write(path: Path, rows: Rows) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def boolq_folder(tmp_path: Path, boolq_rows: Callable[..., Rows], write_jsonl: Callable[[Path, Rows], Path]) -> Path:
    """A folder with 12 training and 6 validation rows."""
    folder = tmp_path / "boolq"
    write_jsonl(folder / "train.jsonl", boolq_rows(12))
    write_jsonl(folder / "validation.jsonl", boolq_rows(6, first=100))
    return folder
