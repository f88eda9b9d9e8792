"""Own text: what a document is, that every token is learnt once, and that documents stay apart."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from grit_lightning.datamodules import BoolQDataModule, TextDataModule
from grit_lightning.datamodules.pipeline.documents import PASSAGE, DocumentRowEncoder, read_text
from grit_lightning.datamodules.pipeline.text_tokens import TextTokens
from grit_lightning.evaluation.generated_answers import AnswerEvaluations
from grit_lightning.evaluation.generation import GenerationSettings

Rows = list[dict[str, Any]]


def texts(module: TextDataModule) -> list[str]:
    """The training documents as the model sees them."""
    return [module.tokenizer.decode(row["input_ids"]) for row in module.examples("train")]


def rows_of(path: Path, division: Any) -> list[str]:
    """The documents of a text file."""
    return [text for table in read_text([path], division=division)[1] for text in table["text"].to_pylist()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six files of one line, one of them with nothing."""
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    for n in range(6):
        name = f"deep/{n}.md" if n % 2 else f"{n}.txt"
        (tmp_path / "notes" / name).write_text(f"Note number {n}.\n", encoding="utf-8")
    (tmp_path / "notes" / "empty.txt").write_text(" \n")
    return tmp_path / "notes"


def test_every_file_of_a_folder_is_a_document(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    module = TextDataModule(tokenizer, str(folder), max_length=64, holdout=0.1)
    module.setup()
    assert [len(module.examples(split)) for split in ("train", "validation", "test")] == [4, 1, 1]
    found = [text for split in ("train", "validation", "test") for text in module.examples(split)["input_ids"][:]]
    assert sorted(tokenizer.decode(ids) for ids in found) == [f"Note number {n}.</s>" for n in range(6)]


def test_everything_is_learnt_in_packed_rows_whose_documents_stay_apart(
    tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    module = TextDataModule(tokenizer, str(folder), max_length=64, batch_size=4)
    module.setup()
    batch = next(iter(module.train_dataloader()))
    real = batch["attention_mask"] == 1
    assert (batch["labels"][real] == batch["input_ids"][real]).all()
    starts = (batch["position_ids"] == 0) & real
    assert int(starts.sum()) == 4 > len(batch["labels"])
    ends = batch["input_ids"][real] == tokenizer.eos_token_id
    assert int(ends.sum()) == 4


@pytest.mark.parametrize("length", [2, 5, 8, 100])
def test_every_token_of_a_long_document_is_learnt_once(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    encoder = DocumentRowEncoder(tokens=TextTokens(tokenizer), max_length=length)
    text = "The quick brown fox jumps."
    blocks = [row.input_ids for row in encoder.encode_rows([{"text": text}], [0])]
    assert max(map(len, blocks)) <= length
    # The first token of a row is never learnt: each block begins with the last token of the one before.
    assert [token for block in blocks for token in block[1:]] == [
        *tokenizer(text, add_special_tokens=False).input_ids[1:],
        tokenizer.eos_token_id,
    ]
    assert all(before[-1] == after[0] for before, after in pairwise(blocks))


def test_a_single_file_is_cut_into_passages_at_paragraphs(tmp_path: Path) -> None:
    paragraph = "word " * 200 + "\n"
    path = tmp_path / "book.txt"
    path.write_text((paragraph + "\n") * 12)
    passages = rows_of(path, "passages")
    assert "".join(passages) == path.read_text()
    assert all(passage.endswith("\n\n") for passage in passages)
    assert [len(passage) >= PASSAGE for passage in passages] == [True, True, True] == [True] * len(passages)


def test_text_without_paragraphs_is_cut_at_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("".join(f"line {n}\n" for n in range(3000)))
    passages = rows_of(path, "passages")
    assert "".join(passages) == path.read_text()
    assert len(passages) > 2
    assert all(passage.endswith("\n") for passage in passages)


def test_a_single_file_is_divided_and_lines_can_be_documents(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {n}\n" for n in range(10)))
    module = TextDataModule(tokenizer, str(path), documents="lines", max_length=64)
    module.setup("fit")
    assert module.division == "lines"
    assert len(module.examples("train")) == 8
    assert TextDataModule(tokenizer, str(path)).division == "passages"


@pytest.mark.parametrize(
    ("documents", "advice"),
    [(None, "break its lines, set data.documents to lines"), ("files", "Set data.documents to passages or lines")],
)
def test_a_file_that_is_one_document_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, documents: Any, advice: str
) -> None:
    (tmp_path / "one.txt").write_text("All in one line.")
    module = TextDataModule(tokenizer, str(tmp_path / "one.txt"), documents=documents)
    with pytest.raises(ValueError, match=rf"one.txt\): expected at least 3 rows, .* hold out .*, got 1. .*{advice}"):
        module.setup()


def test_splits_can_be_files_or_folders(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for split, count in (("train", 3), ("valid", 2), ("test", 1)):
        (tmp_path / split).mkdir()
        for n in range(count):
            (tmp_path / split / f"{n}.txt").write_text(f"{split} {n}")
    module = TextDataModule(tokenizer, str(tmp_path), max_length=64)
    module.setup()
    assert [len(module.examples(split)) for split in ("train", "validation", "test")] == [3, 2, 1]


def test_titles_of_notes_name_no_split(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    for title in ("training-plan.md", "test notes.txt"):
        (folder / title).write_text("A plan.")
    module = TextDataModule(tokenizer, str(folder), max_length=64)
    module.setup()
    assert sum(len(module.examples(split)) for split in ("train", "validation", "test")) == 8


def test_a_table_needs_a_column_of_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_rows: Callable[[Path, Rows], Path]
) -> None:
    path = str(write_rows(tmp_path / "rows.csv", [{"body": f"text {n}"} for n in range(10)]))
    module = TextDataModule(tokenizer, path, columns={"text": "body"}, max_length=64)
    module.setup("fit")
    assert texts(module)[0].startswith("text ")
    with pytest.raises(ValueError, match=r"expected 'text' among the columns, got \['body'\].*set `columns`"):
        TextDataModule(tokenizer, path).setup()
    with pytest.raises(ValueError, match=r"columns: expected a mapping from text"):
        TextDataModule(tokenizer, path, columns={"body": "body"})
    with pytest.raises(ValueError, match=r"documents: expected null for data whose rows are documents, got 'lines'"):
        TextDataModule(tokenizer, path, documents="lines").setup()


def test_an_empty_row_is_named_or_left_out(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_rows: Callable[[Path, Rows], Path]
) -> None:
    rows = [{"text": "" if n == 3 else f"text {n}"} for n in range(10)]
    for split, some in (("train", rows), ("validation", rows[:3]), ("test", rows[:3])):
        write_rows(tmp_path / f"{split}.jsonl", some)
    with pytest.raises(ValueError, match=r"row 4: column 'text': expected a text, got an empty field"):
        TextDataModule(tokenizer, str(tmp_path), max_length=64).setup("fit")
    module = TextDataModule(tokenizer, str(tmp_path), max_length=64, invalid_rows="skip")
    with pytest.warns(UserWarning, match=r"of 10 rows, 1 left out: column 'text' empty"):
        module.setup("fit")
    assert module.dropped["train"] == 1


def test_a_text_file_in_another_encoding_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.txt: expected text in UTF-8, got the byte 0xe9"):
        TextDataModule(tokenizer, str(tmp_path)).setup()


def test_no_answer_is_generated_to_text(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    evaluations = AnswerEvaluations(GenerationSettings(max_new_tokens=4))
    with pytest.warns(UserWarning, match="model.generation: the rows of TextDataModule have no prompts to answer"):
        evaluations.set_up("test", TextDataModule(tokenizer, str(folder)), torch.device("cpu"))
    assert "test" not in evaluations


def test_text_files_are_no_data_of_other_tasks(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="which holds none"):
        BoolQDataModule(tokenizer, str(folder)).setup()
