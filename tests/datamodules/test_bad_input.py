"""Bad input, for every task: the message names the file, the row or line, and the setting to change.

Empty fields, unknown labels and rows without room are errors or left out and counted; missing columns, wrong delimiters, cut
files, an unreachable hub and sources without training rows are errors. Rows are counted in their source, not in the draw.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grit_lightning.datamodules import TaskDataModule
from grit_lightning.datamodules.pipeline.prompts import PromptTemplate

TaskCase = Any  # of conftest.py
Make = Callable[..., TaskDataModule]
Write = Callable[[Path, list[dict[str, Any]]], Path]


def rows_of(case: TaskCase, count: int = 8) -> list[dict[str, Any]]:
    return [case.row(n) for n in range(count)]


def spoilt(case: TaskCase, tmp_path: Path, write: Write, **values: Any) -> Path:
    """Eight rows, of which the fifth has other values."""
    rows = [{column: str(value) for column, value in row.items()} for row in rows_of(case)]
    rows[4] |= values
    return write(tmp_path / "train.jsonl", rows)


@pytest.mark.parametrize("value", ["", " \n", None], ids=["empty", "blank", "null"])
def test_an_empty_field_is_named_or_the_row_skipped_and_counted(
    case: TaskCase, make: Make, tmp_path: Path, write_jsonl: Write, value: Any
) -> None:
    path = spoilt(case, tmp_path, write_jsonl, **{case.required: value})
    settings = {"source": str(path), "holdout": 0.25}
    with pytest.raises(
        ValueError,
        match=rf"train\.jsonl\), row 5: column '{case.required}': expected a value, got an empty field.*invalid_rows=skip",
    ):
        make(case, **settings, invalid_rows="error").setup()
    module = make(case, **settings, invalid_rows="skip")
    with pytest.warns(UserWarning, match=rf"1 left out: column '{case.required}' empty or no text") as said:
        module.setup()
    assert all("train.jsonl" in str(warning.message) for warning in said)
    assert 1 in module.dropped.values()


def test_rows_of_instructions_without_an_answer_are_skipped_by_default_and_others_are_errors(
    cases: dict[str, TaskCase], tiny_tokenizer: Any
) -> None:
    expected = {"alpaca": "skip", "dolly": "skip", "boolq": "error", "qnli": "error", "gsm8k": "error"}
    assert {name: cases[name].cls(tiny_tokenizer).invalid_rows for name in expected} == expected


@pytest.fixture
def own_template(tmp_path: Path) -> str:
    """A template of Alpaca that never names its column input."""
    path = tmp_path / "own.yaml"
    path.write_text('prompt: "{instruction}\\n"\nanswer: "{answer}"\n')
    return str(path)


@pytest.mark.parametrize("value", ["", None, ["a"]], ids=str)
def test_a_column_that_neither_template_nor_answer_uses_may_be_anything(
    cases: dict[str, TaskCase], make: Make, tmp_path: Path, write_jsonl: Write, own_template: str, value: Any
) -> None:
    rows = [{**row, "input": value} for row in rows_of(cases["alpaca"])]
    module = make(cases["alpaca"], source=str(write_jsonl(tmp_path / "rows.jsonl", rows)), template=own_template)
    module.setup()
    assert module.dropped == {"train": 0, "validation": 0, "test": 0}
    assert len(module.examples("train")) == 4


def test_a_column_that_neither_template_nor_answer_uses_may_be_missing(
    cases: dict[str, TaskCase], make: Make, tmp_path: Path, write_jsonl: Write, own_template: str
) -> None:
    rows = [{"instruction": row["instruction"], "output": row["output"]} for row in rows_of(cases["alpaca"])]
    source = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    module = make(cases["alpaca"], source=source, template=own_template)
    module.setup()
    assert len(module.examples("train")) == 4
    with pytest.raises(ValueError, match=r"expected 'input' among the columns, got \['instruction', 'output'\]"):
        make(cases["alpaca"], source=source).setup()


def test_the_warning_names_each_column_that_left_rows_out_as_the_source_calls_it(
    cases: dict[str, TaskCase], make: Make, tmp_path: Path, write_jsonl: Write
) -> None:
    names = {"instruction": "ask", "input": "input", "output": "reply"}
    rows = [{names[column]: value for column, value in row.items()} for row in rows_of(cases["alpaca"], 12)]
    rows[1]["ask"] = ""
    rows[2]["reply"] = rows[3]["reply"] = None
    source = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.warns(UserWarning, match="left out") as said:
        make(cases["alpaca"], source=source, columns={"instruction": "ask", "output": "reply"}).setup()
    found = re.findall(r"(\d) left out: column '(\w+)' empty or no text", " ".join(str(each.message) for each in said))
    counts = {name: sum(int(count) for count, column in found if column == name) for name in ("ask", "reply")}
    assert counts == {"ask": 1, "reply": 2}


def test_a_label_that_a_tasks_dictionary_lacks_is_named_with_its_row(
    cases: dict[str, TaskCase], make: Make, tmp_path: Path, write_jsonl: Write
) -> None:
    class Own(cases["qnli"].cls):  # type: ignore[name-defined, misc]
        def answer(self, row: Any) -> str:
            return {"0": "yes", "1": "no"}[str(row["label"])]

    path = spoilt(cases["qnli"], tmp_path, write_jsonl, label="2")
    module = make(cases["qnli"], source=str(path))
    module.__class__ = Own
    with pytest.raises(ValueError, match=r"row 5: answer: expected a label that the task knows, got '2'"):
        module.setup()


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        ("boolq", {"answer": "maybe"}, r"answer: expected true/false, yes/no or 1/0, got 'maybe'"),
        ("qnli", {"label": "2"}, r"label: expected 0/1 or entailment/not_entailment, got '2'"),
        (
            "qnli",
            {"label": "-1"},
            r"label: expected .*, got -1, which marks a row of GLUE's test split, whose labels",
        ),
        ("imdb", {"label": "-1"}, r"label: expected 1/0, pos/neg or positive/negative, got '-1'"),
        ("gsm8k", {"answer": "It is five."}, r"answer: expected a line '#### <number>', got 'It is five.'"),
    ],
)
def test_an_unknown_label_is_named_or_the_row_skipped(
    cases: dict[str, TaskCase], make: Make, tmp_path: Path, write_jsonl: Write, task: str, values: Any, message: str
) -> None:
    path = spoilt(cases[task], tmp_path, write_jsonl, **values)
    settings = {"source": str(path), "holdout_seed": 1, "holdout": 0.25}
    with pytest.raises(ValueError, match=rf"train\.jsonl\), row 5: {message}.*invalid_rows=skip"):
        make(cases[task], **settings).setup()
    with pytest.warns(UserWarning, match="1 left out: no usable answer"):
        make(cases[task], **settings, invalid_rows="skip").setup()


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(
    case: TaskCase, make: Make, tmp_path: Path, write_jsonl: Write
) -> None:
    first = case.cls.schema[0]  # question or instruction: never cut
    if PromptTemplate.load(case.cls.default_template).truncate == first:
        pytest.skip("its only column is cut, so that any row has room")
    path = spoilt(case, tmp_path, write_jsonl, **{first: "so " * 400})
    module = make(case, source=str(path), holdout=0.25)
    with pytest.warns(UserWarning, match=r"train\.jsonl.*1 left out, as prompt and answer do not fit.*max_length=640"):
        module.setup()
    assert 1 in module.dropped.values()
    assert all(min(module.examples(split)["length"]) > 0 for split in ("train", "validation", "test"))
    for batch in module.train_dataloader():
        assert (batch["labels"] != -100).any(-1).all()


def test_if_no_row_has_room_for_its_answer_it_is_an_error(case: TaskCase, make: Make) -> None:
    with pytest.raises(
        ValueError,
        match=r"left out, .*max_length=9.*Expected at least one row with an answer to learn, got none. Raise max_length",
    ):
        make(case, max_length=9).setup("fit")


def test_a_missing_column_is_named_with_those_found(
    case: TaskCase, make: Make, tmp_path: Path, write_jsonl: Write
) -> None:
    rows = [{("other" if column == case.required else column): v for column, v in row.items()} for row in rows_of(case)]
    with pytest.raises(
        ValueError, match=rf"train\.jsonl\): expected '{case.required}' among the columns, got \[.*'other'.*`columns`"
    ):
        make(case, source=str(write_jsonl(tmp_path / "train.jsonl", rows))).setup("fit")


def test_a_wrong_delimiter_is_recognised(case: TaskCase, make: Make, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("\t".join(case.cls.schema) + "\n" + "\t".join("a" for _ in case.cls.schema) + "\n")
    with pytest.raises(ValueError, match=r"train\.csv\): .*header is separated by '\\t': name the file .tsv"):
        make(case, source=str(path)).setup("fit")


def test_a_truncated_line_is_named(case: TaskCase, make: Make, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows_of(case))[:-9])
    with pytest.raises(ValueError, match=r"train\.jsonl, line 8: expected valid JSON, got .*, possibly truncated"):
        make(case, source=str(path)).setup("fit")


def test_an_unreachable_hub_says_what_to_download_and_how_to_point_at_it(case: TaskCase, make: Make) -> None:
    # conftest sets HF_HUB_OFFLINE, so this is what a machine without network sees
    name = re.escape(case.cls.hub_id)
    message = rf"(?s){name} \(train\).*hf download {name} --repo-type dataset.*set `source` to it"
    with pytest.raises(ConnectionError, match=message):
        make(case, source=None).setup("fit")
    with pytest.raises(ConnectionError, match=message):
        make(case, source=None).prepare_data()


def test_a_source_without_training_rows_is_refused(
    case: TaskCase, make: Make, tmp_path: Path, write_jsonl: Write
) -> None:
    path = write_jsonl(tmp_path / "dev.jsonl", rows_of(case))
    with pytest.raises(
        FileNotFoundError,
        match=r"train data \(.*dev\.jsonl\): expected a source with this split .*, got one without. Change `source`",
    ):
        make(case, source=str(path)).setup("fit")


def test_a_row_is_counted_in_its_source_not_in_the_draw(
    cases: dict[str, TaskCase], make: Make, tmp_path: Path, write_jsonl: Write
) -> None:
    rows = rows_of(cases["gsm8k"], 40)
    rows[30]["answer"] = "thirty-one"
    path = write_jsonl(tmp_path / "test.jsonl", rows)
    with pytest.raises(ValueError, match=r"row 31: answer: expected .*, got 'thirty-one'"):
        make(cases["gsm8k"], source=str(path), test_limit=39, seed=0).setup("test")
