"""Held-out text: which tokens end up in which block, where text may come from, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from grit_lightning.forgetting import TextData
from grit_lightning.forgetting import text as text_module
from grit_lightning.forgetting.likelihood import log_likelihoods

EOS = 2
DOCUMENTS = ["abcdef", "", "ghi", "  ", "jklmnopq"]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(DOCUMENTS)))
    return file


@pytest.fixture
def bos_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a begin-of-sequence token before every text, as Llama's has."""
    from tokenizers.processors import TemplateProcessing

    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tiny_tokenizer("").input_ids == [1]
    return tiny_tokenizer


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def joined(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [*ids(tokenizer, "abcdef"), EOS, *ids(tokenizer, "ghi"), EOS, *ids(tokenizer, "jklmnopq")]


def test_joined_documents_are_one_stream_with_an_end_between_them(
    documents: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    stream = joined(tiny_tokenizer)
    blocks = TextData(str(documents)).read(tiny_tokenizer, 4)
    assert [sequence.ids for sequence in blocks.sequences] == [stream[i : i + 4] for i in range(0, 16, 4)]  # 19 tokens
    assert blocks.weights.tolist() == [3.0] * 4
    assert blocks.size == {"blocks": 4, "tokens": 12}
    assert blocks.name == "documents"


def test_a_begin_of_sequence_token_opens_every_block_and_every_text_token_is_predicted_once(
    documents: Path, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    blocks = TextData(str(documents)).read(bos_tokenizer, 4)
    assert all(sequence.ids[0] == 1 for sequence in blocks.sequences)
    predicted = [token for sequence in blocks.sequences for token in sequence.ids[sequence.start :]]
    stream = joined(bos_tokenizer)
    assert predicted == stream[:18]


def test_a_text_separator_joins_all_rows_as_they_are(documents: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = TextData(str(documents), separator="\n\n").read(tiny_tokenizer, 5)
    tokens = [token for sequence in blocks.sequences for token in sequence.ids]
    assert tokens == ids(tiny_tokenizer, "\n\n".join(DOCUMENTS))[: len(tokens)]
    assert EOS not in tokens


def test_separate_documents_give_their_first_tokens(documents: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = TextData(str(documents), documents="separate").read(tiny_tokenizer, 4)
    assert [tiny_tokenizer.decode(sequence.ids) for sequence in blocks.sequences] == ["abcd", "ghi", "jklm"]
    assert blocks.weights.tolist() == [3.0, 2.0, 3.0]


def test_the_first_blocks_are_taken_and_the_rest_is_not_tokenised(
    documents: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    encode = text_module.encode
    monkeypatch.setattr(text_module, "encode", lambda tokenizer, text: seen.append(text) or encode(tokenizer, text))
    blocks = TextData(str(documents)).read(tiny_tokenizer, 4, 2)
    assert [tiny_tokenizer.decode(sequence.ids) for sequence in blocks.sequences] == ["abcd", "ef</s>g"]
    assert seen == ["abcdef", "ghi"]


def test_loss_is_that_of_transformers(documents: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    model = tiny_llama.double().eval()
    blocks = TextData(str(documents), documents="separate").read(tiny_tokenizer, 6)
    scores = log_likelihoods(
        lambda batch: model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
        blocks.sequences,
        2,
        torch.device("cpu"),
    )
    loss = blocks.values(scores)["loss"] / blocks.weights
    with torch.no_grad():
        rows = [torch.tensor([sequence.ids]) for sequence in blocks.sequences]
        expected = torch.stack([model(row, labels=row).loss for row in rows])
    torch.testing.assert_close(loss, expected.double(), atol=1e-6, rtol=0)  # transformers takes float32
    assert blocks.describe(scores)[0] == {"nats": float(-scores[0]), "tokens": 5}


def as_csv(table: datasets.Dataset, folder: Path) -> Path:
    table.to_csv(folder / "rows.csv")
    return folder / "rows.csv"


def as_parquet(table: datasets.Dataset, folder: Path) -> Path:
    table.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def as_folder(table: datasets.Dataset, folder: Path) -> Path:
    table.to_json(folder / "validation.jsonl")
    return folder


@pytest.mark.parametrize("write", [as_csv, as_parquet, as_folder])
def test_tables_of_any_kind_give_the_same_documents(
    write: Callable[[datasets.Dataset, Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    path = write(datasets.Dataset.from_dict({"body": ["one two", "three"]}), tmp_path / "data")
    assert list(TextData(str(path), column="body").texts()) == ["one two", "three"]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "wiki.txt"
    file.write_text("first line\n\nsecond – line\n", encoding="utf-8")
    assert list(TextData(str(file)).texts()) == ["first line\n\nsecond – line\n"]
    assert TextData(str(file)).label == "wiki"
    assert TextData("allenai/c4").label == "c4"


def test_a_streamed_table_is_read_no_further_than_needed(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def rows() -> Any:
        for number in range(1000):
            read.append(number)
            yield {"text": "word " * 4}

    def load(hub_id: str, config: str, *, split: str, streaming: bool) -> Any:
        assert (hub_id, config, split, streaming) == ("allenai/c4", "en", "validation", True)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    blocks = TextData("allenai/c4", hub_config="en", streaming=True).read(tiny_tokenizer, 10, 4)
    assert len(blocks.sequences) == 4
    assert len(read) < 10


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"source": "empty.txt"}, ValueError, "expected text, got none"),
        ({"source": "blank.jsonl"}, ValueError, "expected text, got none"),
        ({"source": "nosuch.txt"}, FileNotFoundError, "expected a file, got nosuch.txt, which does not exist"),
        ({"source": "nosuch.jsonl"}, FileNotFoundError, "does not exist"),
        (
            {"source": "documents.jsonl", "column": "body"},
            ValueError,
            r"expected the column 'body', got \['text', 'id'\]",
        ),
        (
            {"source": "documents.jsonl", "block_size": 64},
            ValueError,
            "expected enough text to fill a block of 64 tokens, got less",
        ),
        (
            {"source": ".", "split": "test"},
            FileNotFoundError,
            "expected a file of split 'test', got a folder without one",
        ),
        ({"source": "allenai/c4"}, ConnectionError, "Could not get allenai/c4"),  # tests are offline
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_read_is_named(
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
    documents: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(documents.parent)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(documents.parent / "cache"))
    Path("empty.txt").write_text("")
    Path("blank.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    block_size = settings.pop("block_size", 4)
    with pytest.raises(error, match=message):
        TextData(**settings).read(tiny_tokenizer, block_size)


def test_a_tokenizer_without_an_end_token_needs_another_separator(documents: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="with an end-of-sequence token to put between documents, got one without"):
        TextData(str(documents)).read(tiny_tokenizer, 4)
    assert TextData(str(documents), separator=" ").read(tiny_tokenizer, 4).sequences


@pytest.mark.parametrize("settings", [{"documents": "apart"}, {"documents": "separate", "separator": " "}])
def test_options_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="documents"):
        TextData("text.txt", **settings)


def test_a_file_that_an_installed_package_carries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "carrying" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "news.jsonl").write_text('{"document": "first"}\n{"document": "second"}\n')
    monkeypatch.syspath_prepend(tmp_path)
    text = TextData("pypi:carrying/data/news.jsonl", column="document")
    assert list(text.texts()) == ["first", "second"]
    assert text.label == "news"
    with pytest.raises(FileNotFoundError, match=r"'data/old\.jsonl', which it does not have"):
        list(TextData("pypi:carrying/data/old.jsonl").texts())
    with pytest.raises(ModuleNotFoundError, match="no 'missing'"):
        list(TextData("pypi:missing/data/news.jsonl").texts())
