"""General text as rows: from what it is read, which documents are on which side, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from grit_lightning.errors import InvalidValueError, MissingFileError
from grit_lightning.forgetting.general_source import GeneralText
from grit_lightning.forgetting.general_text import GeneralRows, read_general

EOS = 2


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Forty documents, each of one letter and its number."""
    return write(tmp_path / "texts.jsonl", [{"text": f"{chr(97 + n % 26) * 9}{n:02}"} for n in range(40)])


@pytest.fixture
def chat(tmp_path: Path) -> str:
    """Thirty questions with answers."""
    return write(tmp_path / "chat.jsonl", [{"prompt": f"{n:02}?", "completion": f"{n:02}!"} for n in range(30)])


def read(tokenizer: PreTrainedTokenizerFast, *sources: str, **options: Any) -> dict[str, GeneralRows]:
    options = {"block_size": 16, "calibration": 8, "held_out": 4} | options
    return read_general([GeneralText.parse(source) for source in sources], tokenizer, **options)


def documents(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, list[int]]]) -> set[str]:
    """Whole documents in blocks."""
    stream = [token for row in rows for token in row["input_ids"]]
    text = tokenizer.decode(stream).split("</s>")
    return set(text[1:-1])


def test_blocks_are_full_joined_by_the_end_of_sequence_and_of_other_documents_on_each_side(
    texts: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (found,) = read(tiny_tokenizer, texts).values()

    assert (len(found.calibration), len(found.held_out)) == (8, 4)
    assert all(row["learnt"] == [0, 16] and len(row["input_ids"]) == 16 for row in found.calibration + found.held_out)
    calibration, held_out = (documents(tiny_tokenizer, rows) for rows in (found.calibration, found.held_out))
    given = {json.loads(line)["text"] for line in Path(texts).read_text().splitlines()}
    assert calibration | held_out < given
    assert (
        len(calibration) == 9
    )  # 8 · 16 tokens are 10 documents of 12, the first and the last of which are not looked at
    assert not calibration & held_out
    assert found.remark == "8 blocks (128 tokens), 4 blocks (64 tokens) of other documents held out"


def test_the_seed_alone_decides_which_documents_are_taken(texts: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert read(tiny_tokenizer, texts, seed=1) == read(tiny_tokenizer, texts, seed=1)
    assert read(tiny_tokenizer, texts, seed=1) != read(tiny_tokenizer, texts, seed=2)


def test_conversations_stay_rows_in_which_the_answer_counts(chat: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (found,) = read(tiny_tokenizer, f"{chat}:0.5", block_size=64).values()

    assert (len(found.calibration), len(found.held_out), found.weight) == (8, 4, 0.5)
    answers = []
    for row in found.calibration + found.held_out:
        start, end = row["learnt"]
        answers.append(tiny_tokenizer.decode(row["input_ids"][start:end], skip_special_tokens=True).strip())
        assert f"{answers[-1][:2]}?" in tiny_tokenizer.decode(row["input_ids"][:start])
    assert len(set(answers)) == 12  # so no conversation is on both sides
    assert "12" not in found.remark
    assert "8 conversations" in found.remark


def test_a_text_file_is_divided_into_passages(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    paragraphs = [f"{n:04} " * 900 + "\n\n" for n in range(6)]
    (tmp_path / "valid.txt").write_text("".join(paragraphs))  # whose name says a split: it is all there is

    (found,) = read(tiny_tokenizer, str(tmp_path / "valid.txt"), calibration=4000).values()

    numbers = [{tiny_tokenizer.decode(row["input_ids"])[5:10] for row in rows} for rows in found[:2]]
    assert len(found.calibration) < 4000  # as many as there are
    assert not {text for text in numbers[0] if text.strip().isdigit()} & numbers[1]


def test_a_folder_with_files_of_two_types_is_refused(texts: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "more.txt").write_text("some text\n" * 2000)
    with pytest.raises(
        InvalidValueError, match=r"expected files of one type in a folder, got \.jsonl, \.txt\. Give each"
    ):
        read(tiny_tokenizer, str(tmp_path))
    Path(texts).rename(tmp_path / "_aside.jsonl")
    (tmp_path / "more.md").write_text("some more\n" * 2000)
    assert read(tiny_tokenizer, str(tmp_path))


def test_a_folder_with_splits_gives_training_rows_to_calibrate_and_validation_rows_to_measure(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    write(tmp_path / "train.jsonl", [{"text": "t" * 20}] * 2 + [{"text": "u" * 20}])
    write(tmp_path / "validation.jsonl", [{"text": "v" * 20}, {"text": "t" * 20}])
    write(tmp_path / "test.jsonl", [{"text": "x" * 20}])

    (found,) = read(tiny_tokenizer, str(tmp_path)).values()

    letters = [
        set("".join(tiny_tokenizer.decode(row["input_ids"]) for row in rows)) & set("tuvx") for rows in found[:2]
    ]
    assert letters == [{"t", "u"}, {"v"}]  # a document of both splits is not measured on


def test_documents_of_one_source_are_not_measured_on_in_another(
    texts: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_text("".join(reversed(Path(texts).read_text().splitlines(keepends=True))))

    found = read(tiny_tokenizer, texts, f"{copy}:2")

    assert [rows.weight for rows in found.values()] == [1.0, 2.0]
    seen = set.union(*(documents(tiny_tokenizer, rows.calibration) for rows in found.values()))
    measured = set.union(*(documents(tiny_tokenizer, rows.held_out) for rows in found.values()))
    assert measured
    assert not seen & measured


def test_sources_of_the_same_name_are_told_apart(texts: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other" / "texts.jsonl", [{"text": f"{n:09}"} for n in range(40)])

    task = write(tmp_path / "task.jsonl", [{"text": f"{n:08}"} for n in range(40)])

    assert list(read(tiny_tokenizer, texts, other, task)) == [
        "texts",
        "texts2",
        "task2",
    ]  # the task's rows have that name


def test_a_table_on_the_hub_is_asked_for_with_its_configuration(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    asked = []

    def read_hub(hub_id: str, config: str | None, split: str | None, streaming: bool = False) -> Any:
        asked.append((hub_id, config))
        table = datasets.Dataset.from_list([{"text": f"{n:09}"} for n in range(40)])
        return {"validation": table} if split is None else table

    for module in ("own_source", "task_table"):
        monkeypatch.setattr(f"grit_lightning.datamodules.pipeline.{module}.read_hub", read_hub)

    (found,) = read(tiny_tokenizer, "Salesforce/wikitext/wikitext-2-raw-v1").values()

    assert set(asked) == {("Salesforce/wikitext", "wikitext-2-raw-v1")}
    assert len(found.calibration) == 8  # of the only split there is


def test_what_cannot_be_read_is_refused(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        MissingFileError, match=r"General text: expected a file.*got nowhere\.txt, which does not exist"
    ):
        read(tiny_tokenizer, "nowhere.txt")
    with pytest.raises(InvalidValueError, match=r"--general a\.txt:-1: expected a weight above 0"):
        GeneralText.parse("a.txt:-1")
    numbers = write(tmp_path / "numbers.jsonl", [{"number": 1}, {"number": 2}])
    with pytest.raises(
        InvalidValueError, match=r"expected a column of documents .text, .*, or those of a conversation"
    ):
        read(tiny_tokenizer, numbers)
    one = write(tmp_path / "one.jsonl", [{"text": "alone"}])
    with pytest.raises(InvalidValueError, match=r"expected at least two documents, .*got 1\. Give"):
        read(tiny_tokenizer, one)
    (tmp_path / "brief.txt").write_text("a" * 50)
    with pytest.raises(
        InvalidValueError, match=r"two documents, .*got 1 of 50 characters, and a passage has about 4,000"
    ):
        read(tiny_tokenizer, str(tmp_path / "brief.txt"))
    short = write(tmp_path / "short.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(InvalidValueError, match=r"16 tokens for calibration rows, got 2 tokens in 1 document\. Give"):
        read(tiny_tokenizer, short)
    same = write(tmp_path / "same.jsonl", [{"text": "a" * 30}] * 4)
    nothing_new = "for held-out rows, got 0 tokens in 0 documents, beside 1 that are among the calibration rows"
    with pytest.raises(InvalidValueError, match=nothing_new):
        read(tiny_tokenizer, same)
    long = write(tmp_path / "long.jsonl", [{"prompt": "a" * 30, "completion": "b"}] * 4)
    with pytest.raises(
        InvalidValueError, match=r"a conversation of at most 16 tokens .*got 3 conversations that are none"
    ):
        read(tiny_tokenizer, long)


def test_a_column_of_documents_may_have_another_usual_name(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = tmp_path / "news"
    folder.mkdir()
    lines = [json.dumps({"id": n, "document": f"document {n} " * 4, "summary": "short"}) for n in range(12)]
    (folder / "test.jsonl").write_text("\n".join(lines))
    source = GeneralText(str(folder / "test.jsonl"))
    rows = read_general([source], tiny_tokenizer, block_size=24, calibration=4, held_out=2)
    assert list(rows) == ["news"]
    text = tiny_tokenizer.decode(rows["news"].calibration[0]["input_ids"])
    assert "document" in text
    assert "short" not in text
