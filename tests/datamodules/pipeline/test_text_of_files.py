"""Text is text: what stands in a file is what is read, in every format, and what is no text is refused with its place."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grit_lightning.datamodules import AlpacaDataModule
from grit_lightning.datamodules.pipeline.delimited import is_quoted
from grit_lightning.datamodules.pipeline.sources import READERS, read_files

TaskCase = Any  # of conftest.py

AWKWARD = [
    "2021-03-01",
    "2021-03-01T10:00:00Z",
    "007",
    "1.50",
    "1e5",
    "-0",
    "NA",
    "null",
    "nan",
    "True",
    "",
    " spaces \t around ",
    'He said "no", twice: ""',
    '"quoted"',
    "first line\nsecond line\n",
    "first line\r\nsecond line\rthird line",
    "comma, semicolon; pipe|",
    "Zwölf Cafe\u0301 \u2028\u0085\u200bשלום 🙂",
    "\ufeffbyte-order mark",
    "\\n \\u0041 \\",
]


def _quoted(path: Path, values: Sequence[str], separator: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([("number", "text"), *enumerate(values)])


WRITERS: dict[str, Callable[[Path, Sequence[str]], Any]] = {
    ".csv": lambda path, values: _quoted(path, values, ","),
    ".tsv": lambda path, values: _quoted(path, values, "\t"),
    ".jsonl": lambda path, values: path.write_text(
        "".join(json.dumps({"text": value}, ensure_ascii=False) + "\n" for value in values), encoding="utf-8"
    ),
    ".json": lambda path, values: path.write_text(json.dumps([{"text": value} for value in values]), encoding="utf-8"),
    ".parquet": lambda path, values: pq.write_table(pa.table({"text": list(values)}), path),
}


def refuse(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        read_files([path])


@pytest.fixture
def learnt(tokenizer: Any, tmp_path: Path) -> Callable[..., list[str]]:
    """Texts of the prompts that Alpaca makes of a file, without normalisation."""
    template = tmp_path / "template.yaml"
    template.write_text('prompt: "{instruction}"\nanswer: "{answer}"\n')

    def read(path: Path, **settings: Any) -> list[str]:
        module = AlpacaDataModule(
            tokenizer, str(path), template=str(template), normalise_text=False, max_length=600, **settings
        )
        rows = module.table.rows("train")
        return [tokenizer.decode(row["input_ids"][: row["prompt_length"]]) for row in module._tokenised(rows, "train")]

    return read


def test_every_reader_has_a_writer_here_and_there_are_twenty_awkward_values() -> None:
    assert WRITERS.keys() == READERS.keys()
    assert len(set(AWKWARD)) == 20


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_reader_gives_awkward_values_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, AWKWARD)
    assert read_files([path])["text"][:] == AWKWARD


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("alone", ["2021-03-01", "007", "1e5", "NA", "True"])
def test_a_column_of_nothing_but_lookalikes_is_text_too(tmp_path: Path, suffix: str, alone: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [alone] * 3)
    assert read_files([path])["text"][:] == [alone] * 3


def test_what_is_read_is_what_is_tokenised(tmp_path: Path, learnt: Callable[..., list[str]]) -> None:
    values = [value for value in AWKWARD if value.strip()]
    path = tmp_path / "train.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("instruction", "input", "output"), *((value, "-", "a") for value in values)])
    module_rows = learnt(path, holdout=0.01)
    assert set(module_rows) < set(values)
    assert len(module_rows) >= len(values) - 2  # validation and test take one each


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_compressed_files_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    plain = tmp_path / f"rows{suffix}"
    WRITERS[suffix](plain, AWKWARD)
    packed = tmp_path / f"packed{suffix}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_files([packed]).to_list() == read_files([plain]).to_list()
    refuse(tmp_path, f"cut{suffix}.gz", packed.read_bytes()[:-9], "expected a whole gzip file")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_byte_order_marks_line_ends_and_blank_lines_do_not_change_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ["a", "b"])
    content = path.read_bytes().replace(b"\r\n", b"\n")
    path.write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert read_files([path])["text"][:] == ["a", "b"]


def test_a_column_that_turns_to_text_late_is_text_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a\n" + "1\n" * 10_500 + "one\n")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n' * 10_500 + '{"a": "one"}\n')
    for name in ("rows.csv", "rows.jsonl"):
        values = read_files([tmp_path / name])["a"][:]
        assert (values[0], values[-1], len(values)) == ("1", "one", 10_501)


def test_very_long_fields_are_whole(tmp_path: Path) -> None:
    WRITERS[".csv"](tmp_path / "rows.csv", ["x" * 200_000, "y"])
    assert read_files([tmp_path / "rows.csv"])["text"][:] == ["x" * 200_000, "y"]


def test_json_keeps_labels_and_the_spelling_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"yes": true, "class": 1, "price": 1.50, "mixed": 1e5, "nested": {"a": [1, "2"]}, "big": 123456789012345678901}\n'
        '{"yes": null, "class": null, "price": 2, "mixed": "x", "nested": 3, "big": -0, "late": false}\n'
    )
    assert read_files([path]).to_list() == [
        {"yes": True, "class": 1, "price": "1.50", "mixed": "1e5", "nested": {"a": [1, "2"]}}
        | {"big": "123456789012345678901", "late": None},
        {"yes": None, "class": None, "price": "2", "mixed": "x", "nested": 3, "big": "-0", "late": False},
    ]


def test_a_json_list_may_also_be_an_object_a_line(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"a": "x"}\n{"a": "y"}\n')
    assert read_files([tmp_path / "rows.json"])["a"][:] == ["x", "y"]


def test_pandas_categories_are_their_values(tmp_path: Path) -> None:
    table = pa.table({"label": pa.array(["yes", "no", "yes"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert read_files([tmp_path / "rows.parquet"])["label"][:] == ["yes", "no", "yes"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"q": "a"}\n{"q": NaN}\n', "line 2: expected valid JSON, got NaN"),
        ("b.jsonl", '{"q": "a"}\n{"q": "\\ud83d"}\n', "row 2: column 'q': expected text, got half of a surrogate pair"),
        ("c.jsonl", '{"q": "a", "q": "b"}\n', "line 1: expected each name once in an object, got .'q'. twice"),
        ("d.jsonl", '{"q": "a"}\n["b"]\n', "row 2: expected an object with the columns of a row"),
        ("e.json", '["a"]', "row 1: expected an object with the columns of a row"),
        ("f.csv", "q,a\n1,2\n3\n", "row 2: expected 2 fields, as in the header, got 1"),
        ("g.csv", "q,a\n1,2,3\n", "row 1: expected 2 fields, as in the header, got 3"),
        ("h.csv", "q;a\n1,5;2\n", "row 1: expected 1 fields, .*separated by ';'"),
        ("i.csv", "q,q\n1,2\n", "expected another name for each column, got .'q'. twice"),
        ("j.csv", 'q,a\n"never closed,1\n', r"row 1 \(line 2\): expected fields that hold quotation marks"),
        ("k.csv", 'q,a\n"x" y,1\n', r"row 1 \(line 2\): expected fields that hold quotation marks"),
        ("l.csv", "q,a\n1,2\nx\ry,1\n", r"row 2 \(line 3\): expected fields that hold quotation marks and line ends"),
        ("m.csv", b"q,a\n\xe4,1\n", "expected text in UTF-8, got the byte 0xe4. Save the file as UTF-8"),
        ("n.jsonl", '{"q": "ä"}'.encode("utf-16"), "expected text in UTF-8, got the byte 0xff"),
        ("o.parquet", b"PAR1", "expected a parquet file"),
    ],
)
def test_what_is_no_text_or_no_row_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    refuse(tmp_path, name, content, message)


def test_an_index_without_a_name_is_no_column_of_the_task(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(",q\n0,a\n")  # as pandas writes it
    assert read_files([tmp_path / "rows.csv"]).to_list() == [{"Unnamed: 0": "0", "q": "a"}]


RAW_TSV = 'question\tlabel\n"No?\t1\n"Yes" he said\t0\n"Yes"\t1\n'


def test_tsv_without_quoting_as_glue_writes_it_keeps_its_quotation_marks(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text(RAW_TSV)
    assert read_files([tmp_path / "dev.tsv"])["question"][:] == ['"No?', '"Yes" he said', '"Yes"']


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("value", ['say "no"', '"Yes" he said', "a\ttab", "two\nlines", '"'])
def test_tsv_as_pandas_writes_it_loses_the_quotation_marks_of_quoting(tmp_path: Path, quoting: Any, value: str) -> None:
    pd.DataFrame({"question": ["plain", value], "label": [1, 0]}).to_csv(
        tmp_path / "dev.tsv", sep="\t", index=False, quoting=quoting
    )
    assert read_files([tmp_path / "dev.tsv"]).to_list() == [
        {"question": "plain", "label": "1"},
        {"question": value, "label": "0"},
    ]


@pytest.mark.parametrize(
    "lines",
    [
        ["q\tl\n", '"a\tb"\n'],  # quoted, this would be one field
        ["q\tl\n", '"Yes"\t1\n'],  # nothing needs the marks
        ["q\tl\n", '"a ""b"" c"\t1\n', 'five" nails\t0\n'],  # a program that quotes would have quoted the last
        ["q\tl\n", '"never closed\t1\n', "a\t0\n"],
    ],
)
def test_a_tsv_that_no_program_would_have_quoted_so_is_not_quoted(lines: list[str]) -> None:
    assert not is_quoted(lines)


def test_the_real_qnli_is_not_quoted(real_file: Callable[[TaskCase], Path], cases: dict[str, TaskCase]) -> None:
    path = real_file(cases["qnli"])
    lines = path.read_text(encoding="utf-8").split("\n")[1:]
    expected = [line.split("\t")[2] for line in lines if line]
    assert read_files([path])["sentence"][:] == expected
    assert any(sentence.startswith('"') for sentence in expected)


@pytest.mark.parametrize("value", [["a"], {"a": "b"}, True, 1.5, math.nan], ids=str)
@pytest.mark.parametrize("column", ["instruction", "output"])
def test_a_value_that_is_no_text_is_refused_with_row_and_column(
    tmp_path: Path, learnt: Callable[..., list[str]], column: str, value: Any
) -> None:
    rows = {name: ["a"] * 3 for name in ("instruction", "input", "output")}
    datasets.Dataset.from_dict(rows | {column: [value] * 3}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=rf"train\.parquet\), row \d: column '{column}': expected text, got"):
        learnt(tmp_path / "train.parquet", invalid_rows="error")
