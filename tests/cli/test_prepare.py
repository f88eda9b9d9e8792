"""`grit prepare`.

A complete copy is written in the hub's columns and said to be one; a changed one ends with status 1. It knows every exported
task by itself, and the hashes of each name columns that the task has; the real files agree with them.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from grit_lightning import datamodules
from grit_lightning.cli.prepare import check_split, prepare_command, prepare_task, task_names
from grit_lightning.cli.program import main
from grit_lightning.datamodules import TASKS, GSM8KDataModule, TaskDataModule
from grit_lightning.datamodules.pipeline.published import PublishedSplit, column_hash

ROWS = [{"question": f"What is {n}? ", "answer": f"It is {n}.\n#### {n}"} for n in range(5)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five training and two test rows of GSM8K."""
    folder = tmp_path / "source"
    folder.mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:2])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, PublishedSplit]:
    """As if those rows were what was published, with their hashes computed here."""
    questions = "".join(json.dumps(row["question"].strip()) + "\n" for row in ROWS)
    known = {
        "train": PublishedSplit(5, {"question": hashlib.sha256(questions.encode()).hexdigest()}),
        "test": PublishedSplit(2),
    }
    monkeypatch.setattr(GSM8KDataModule, "published", known)
    return known


def test_a_complete_copy_is_written_in_the_hubs_columns_and_said_to_be_one(
    source: Path, published: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["prepare", "--task", "gsm8k", "--source", str(source), "--output", str(tmp_path / "new" / "gsm8k")])
    said = capsys.readouterr().out
    assert "question: as published" in said
    assert "not checked" in said
    for split, rows in (("train", ROWS), ("test", ROWS[:2])):
        lines = (tmp_path / "new" / "gsm8k" / f"{split}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == rows
    assert not any(check.differs for check in prepare_task("gsm8k", str(tmp_path / "new" / "gsm8k")))


@pytest.mark.parametrize("change", ["missing row", "other text"])
def test_a_changed_copy_ends_with_status_1(
    source: Path, published: Any, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    rows = ROWS[:-1] if change == "missing row" else [*ROWS[:-1], {**ROWS[-1], "question": "Why?"}]
    (source / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as exit_:
        main(["prepare", "--task", "gsm8k", "--source", str(source)])
    assert exit_.value.code == 1
    assert "question: differs" in capsys.readouterr().out


def test_a_folder_that_is_not_empty_is_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "--task", "gsm8k", "--source", str(source), "--output", str(source)])
    assert "which is not empty. Choose another" in capsys.readouterr().err


def test_without_a_network_it_says_what_to_download(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "--task", "dolly"])
    assert "hf download databricks/databricks-dolly-15k --repo-type dataset" in capsys.readouterr().err


def test_every_exported_task_with_published_data_can_be_prepared(capsys: pytest.CaptureFixture[str]) -> None:
    exported = [item for item in vars(datamodules).values() if isinstance(item, type)]
    tasks = {item for item in exported if issubclass(item, TaskDataModule) and item.hub_id}
    assert len(tasks) >= 5
    assert set(TASKS.values()) == tasks
    assert set(task_names()) == set(TASKS)
    with pytest.raises(SystemExit):
        prepare_command(["--help"])
    assert f"--task {{{','.join(sorted(TASKS))}}}" in capsys.readouterr().out


def test_hashes_are_those_of_the_columns_that_tasks_have() -> None:
    for task in TASKS.values():
        assert task.published.keys() <= set(task.hub_splits)
        for split in task.published.values():
            assert split.sha256.keys() <= set(task.schema)


def test_an_unknown_split_is_not_checked() -> None:
    check = check_split("qnli", "test", datasets.Dataset.from_list([{"question": "a", "sentence": "b", "label": -1}]))
    assert not check.differs
    assert set(check.hashes.values()) == {"not checked"}


def test_values_are_hashed_without_their_surrounding_whitespace() -> None:
    one, other = ({"a": [f"x{end}", "y"], "b": ["x", f"y {end}"]} for end in ("", "\n"))
    assert column_hash(datasets.Dataset.from_dict(one), "a") == column_hash(datasets.Dataset.from_dict(other), "a")


def test_the_real_gsm8k_and_qnli_are_as_published() -> None:
    folders = [parent / "shared" / "data" for parent in Path(__file__).resolve().parents]
    if chosen := os.environ.get("GRIT_TEST_DATA"):
        folders = [Path(chosen)]
    found = next((folder for folder in folders if (folder / "gsm8k").is_dir()), None)
    if found is None:
        pytest.skip("no real data: neither GRIT_TEST_DATA nor shared/data beside the checkout holds gsm8k")
    checks = prepare_task("gsm8k", str(found / "gsm8k")) + prepare_task("qnli", str(found / "qnli" / "dev.tsv"))
    assert [check.rows for check in checks] == [7473, 1319, 5463]
    assert not any(check.differs for check in checks)
    assert [sum(state == "as published" for state in check.hashes.values()) for check in checks] == [2, 2, 2]
