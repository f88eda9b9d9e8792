"""Own labels: names become scored answers, whatever stands in the file, and what is no label is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from grit_lightning.datamodules import ClassificationDataModule

from .chat_families import chat_tokenizer

Rows = list[dict[str, Any]]
MOODS = [
    {"text": f"It is a {kind} day, number {n}.", "label": kind} for n in range(8) for kind in ("bad", "good", "so-so")
]
STARS = [{"text": f"Text {n}.", "label": n % 2} for n in range(20)]


@pytest.fixture
def make(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_rows: Callable[[Path, Rows], Path]
) -> Callable[..., ClassificationDataModule]:
    """A data module over a file of rows."""

    def build(rows: Rows, ending: str = "csv", **settings: Any) -> ClassificationDataModule:
        path = write_rows(tmp_path / f"mine.{ending}", rows)
        return ClassificationDataModule(tokenizer, str(path), **{"holdout": 0.1, **settings})

    return build


def test_label_names_are_the_answers(make: Callable[..., ClassificationDataModule]) -> None:
    module = make(MOODS)
    module.setup()
    assert module.choices == ["bad", "good", "so-so"]
    for row in module.examples("train"):
        text = module.tokenizer.decode(row["input_ids"])
        learnt = module.tokenizer.decode(row["input_ids"][row["prompt_length"] :])
        assert text.endswith(f"\nLabel:{learnt}")
        assert learnt == f" {module.choices[row['target']]}" == f" {row['reference']}"


def test_more_than_two_classes_are_scored(make: Callable[..., ClassificationDataModule]) -> None:
    module = make(MOODS)
    module.setup()
    metrics = module.metrics()
    assert metrics is not None
    batch = next(iter(module.test_dataloader()))
    assert batch["choice_ids"].shape[:2] == (2, 3)
    metrics.update(torch.zeros_like(batch["target"]), batch["target"])
    computed = metrics.compute()
    assert set(computed) == {"accuracy", "precision", "recall", "f1"}
    assert computed["accuracy"] == (batch["target"] == 0).float().mean()


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_numbers_get_names_and_an_order(make: Callable[..., ClassificationDataModule], ending: str) -> None:
    module = make(STARS, ending, labels={"1": "great", "0": "poor"})
    module.setup("fit")
    assert module.choices == ["great", "poor"]
    assert {row["target"] for row in module.examples("train")} == {0, 1}
    plain = make(STARS, ending)
    plain.setup("fit")
    assert plain.choices == ["0", "1"]


def test_several_values_may_have_one_name(make: Callable[..., ClassificationDataModule]) -> None:
    module = make(MOODS, labels={"bad": "no", "good": "yes", "so-so": "no"})
    module.setup("fit")
    assert module.choices == ["no", "yes"]


def test_true_and_false_are_labels(make: Callable[..., ClassificationDataModule]) -> None:
    rows = [{"text": f"Text {n}.", "label": n % 2 == 0} for n in range(20)]
    module = make(rows, "jsonl")
    module.setup("fit")
    assert module.choices == ["false", "true"]


def test_a_table_that_names_its_labels_gives_the_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.chdir(tmp_path)
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])}
    )
    table = {"train": datasets.Dataset.from_list(STARS, features=features)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split=None, **__: table if split is None else table[split])
    module = ClassificationDataModule(tokenizer, "owner/mails", holdout=0.1)
    module.setup("fit")
    assert module.choices == ["ham", "spam"]


@pytest.mark.parametrize("labels", [["bad", "good"], {"bad": "bad", "good": "good"}])
def test_a_label_outside_of_the_list_is_named(make: Callable[..., ClassificationDataModule], labels: Any) -> None:
    with pytest.raises(
        ValueError, match=r"mine.csv\), row \d+: label: expected one of \['bad', 'good'\], got 'so-so'. Set data.labels"
    ):
        make(MOODS, labels=labels).setup()
    skipping = make(MOODS * 3, labels=labels, invalid_rows="skip", holdout=0.3)
    with pytest.warns(UserWarning, match="left out: no usable answer"):
        skipping.setup("fit")
    assert {row["reference"] for row in skipping.examples("train")} == {"bad", "good"}


def test_a_validation_label_that_training_lacks_is_named(
    tmp_path: Path, write_rows: Callable[[Path, Rows], Path]
) -> None:
    write_rows(tmp_path / "own" / "train.csv", MOODS)
    write_rows(tmp_path / "own" / "validation.csv", [{"text": "x", "label": "godo"}])
    own = ClassificationDataModule(chat_tokenizer("chatml"), str(tmp_path / "own"))
    with pytest.raises(ValueError, match=r"validation.csv\), row 1: label: .* got 'godo'. Did you mean `good`\?"):
        own.setup("fit")


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (
            [{"text": f"t{n}", "label": "same"} for n in range(9)],
            r"expected 2 to 100 .* 'label', got 1 \('same'\). Set data",
        ),
        (
            [{"text": f"t{n}", "label": f"label {n}"} for n in range(200)],
            r"expected 2 to 100 different labels .*, got 200",
        ),
        (
            [{"text": f"t{n}", "mood": "good"} for n in range(9)],
            r"expected 'label' among the columns, got \['text', 'mood'\]",
        ),
        (
            [{"text": f"t{n}", "label": n / 7} for n in range(9)],
            r"column 'label': expected text, got 0\.\d+ of type float",
        ),
    ],
)
def test_a_column_that_holds_no_labels_is_named(
    make: Callable[..., ClassificationDataModule], rows: Rows, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        make(rows, "parquet").setup()


def test_one_label_is_no_list(make: Callable[..., ClassificationDataModule]) -> None:
    with pytest.raises(ValueError, match=r"labels: expected at least two, all of them different, got \['a'\]"):
        make(MOODS, labels=["a"])


def test_a_long_text_loses_its_end(make: Callable[..., ClassificationDataModule]) -> None:
    module = make([{**row, "text": row["text"] * 20} for row in MOODS], max_length=60)
    with pytest.warns(UserWarning, match="lost the end of 'text' to fit"):
        module.setup("fit")
    row = module.examples("train")[0]
    assert len(row["input_ids"]) == 60
    assert module.tokenizer.decode(row["input_ids"]).endswith(f"\nLabel: {row['reference']}")


def test_labels_can_be_asked_for_in_a_chat(tmp_path: Path, write_rows: Callable[[Path, Rows], Path]) -> None:
    path = str(write_rows(tmp_path / "mine.csv", MOODS))
    module = ClassificationDataModule(chat_tokenizer("chatml"), path, use_chat_template=True)
    module.setup("fit")
    text = module.tokenizer.decode(module.examples("train")[0]["input_ids"])
    assert text.endswith(f"<|im_start|>assistant\n{module.examples('train')[0]['reference']}")


def test_other_columns_are_mapped(make: Callable[..., ClassificationDataModule]) -> None:
    rows = [{"review": row["text"], "stars": row["label"]} for row in MOODS]
    module = make(rows, columns={"text": "review", "label": "stars"})
    module.setup("fit")
    assert module.choices == ["bad", "good", "so-so"]
