"""Normalised text: what looks the same is spelt the same, what carries meaning stays, and it can be switched off."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grit_lightning.datamodules import AlpacaDataModule
from grit_lightning.datamodules.pipeline.text import normalise

UGLY = "\ufeffCafe\u0301 \r\n\tdef f():\x00\r    pass\t \u2028 end\x85\n\n"


def test_unicode_line_ends_controls_and_trailing_space_are_unified_and_indentation_stays() -> None:
    assert normalise(UGLY) == "Caf\u00e9\n\tdef f():\n    pass\n end"


@pytest.mark.parametrize(
    "text", ["a\u200db", "\u0646\u200c\u06cc", "x\u00a0y", "👩\u200d🚀", "  indented", "a\n\n\nb", ""]
)
def test_what_carries_meaning_stays(text: str) -> None:
    assert normalise(text) == unicodedata.normalize("NFC", text)


def test_normalising_twice_changes_nothing() -> None:
    every = "".join(chr(code) for code in range(0x3000) if not 0xD800 <= code < 0xE000)
    assert normalise(normalise(every)) == normalise(every)
    left = {c for c in normalise(every) if unicodedata.category(c) == "Cc"}
    assert left <= {"\n", "\t"}


@pytest.mark.parametrize("on", [True, False])
def test_rows_are_normalised_unless_switched_off(
    tokenizer: Any, tmp_path: Path, write_jsonl: Callable[..., Path], on: bool
) -> None:
    rows = [{"instruction": "Do.", "input": UGLY, "output": UGLY + str(n)} for n in range(4)]
    source = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    module = AlpacaDataModule(tokenizer, source, max_length=640, holdout=0.25, normalise_text=on)
    module.setup("fit")
    example = module.examples("train")[0]
    expected = normalise if on else str
    assert example["reference"] in {expected(row["output"]) for row in rows}
    assert expected(UGLY) in tokenizer.decode(example["input_ids"][: example["prompt_length"]])
