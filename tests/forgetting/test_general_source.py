"""Where general text comes from: what it is called, and the documents it is divided into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from grit_lightning.forgetting.general_source import GeneralText, open_text


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("between", [" ", ""])
def test_a_line_without_an_end_is_cut_into_passages_too(between: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    text = between.join(f"{n:05}" for n in range(6000))
    (tmp_path / "one.txt").write_text(text)
    (tmp_path / "two.txt").write_text("short\n" * 1400 + text)

    for name in ("one.txt", "two.txt"):
        opened = open_text(GeneralText(str(tmp_path / name)), tiny_tokenizer, 16, 0.3, 0)
        sides = [opened.for_calibration, opened.for_measuring]
        passages = {number: row for side in sides for number, row in zip(side.numbers, side.table["text"], strict=True)}
        ordered = [passages[number] for number in sorted(passages)]
        assert "".join(ordered) == (tmp_path / name).read_text()
        assert max(map(len, ordered)) < 9000
        assert not between or all(passage[-1].isspace() for passage in ordered[:-1])
        assert len(sides[1].table) >= 1


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("wiki.v1.txt", "wiki.v1"),
        (".hidden.txt", ".hidden"),
        ("c4.jsonl.gz", "c4"),
        ("news/test.jsonl", "news"),
        ("my.texts", "my.texts"),
        ("owner/wikitext-2.raw", "wikitext-2.raw"),
        ("/", "text"),
    ],
)
def test_results_are_called_by_the_stem_of_a_file(source: str, label: str) -> None:
    assert GeneralText(source).label == label


def test_a_folder_without_a_name_is_called_by_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    assert GeneralText(".").label == "in"
    assert GeneralText("..").label == tmp_path.name


@pytest.mark.parametrize(
    ("words", "source", "weight", "config"),
    [
        ("wiki.txt", "wiki.txt", 1.0, None),
        ("wiki.txt:2", "wiki.txt", 2.0, None),
        ("C:/wiki.txt", "C:/wiki.txt", 1.0, None),
        ("allenai/c4/en:0.5", "allenai/c4", 0.5, "en"),
        ("data/texts/wiki.txt", "data/texts/wiki.txt", 1.0, None),
    ],
)
def test_what_stands_on_a_command_line(words: str, source: str, weight: float, config: str | None) -> None:
    assert GeneralText.parse(words) == GeneralText(source, weight, hub_config=config)
