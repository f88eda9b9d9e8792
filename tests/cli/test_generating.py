"""`grit test` and `grit predict` with generated answers: one file more in the run's folder, and its scores in the summary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grit_lightning.cli.program import main

Grit = Callable[..., None]
COPIED = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # `trained` is a copy
GENERATE = ("--model.generation.max_new_tokens=4", "--model.generation.stages=[test, predict]")


def read(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@COPIED
@pytest.mark.usefixtures("trained")
def test_testing_a_checkpoint_ends_with_generated_answers_in_its_folder(grit: Grit) -> None:
    grit("test", "--ckpt_path=a/checkpoints/last.ckpt", *GENERATE)
    records = read("a/generations-test.jsonl")
    assert [record["row"] for record in records] == list(range(8))
    assert {"prompt", "output", "finished", "reference", "answer", "correct"} < set(records[0])
    after = json.loads(Path("a/summary.json").read_text())["metrics"]["after"]
    both = {f"test/{kind}{name}" for kind in ("", "generated_") for name in ("accuracy", "precision", "recall", "f1")}
    assert both | {"test/unmapped", "test/loss"} <= after.keys()


def test_prediction_writes_answers_and_overwriting_removes_them(grit: Grit, capsys: pytest.CaptureFixture[str]) -> None:
    grit("predict", "--output=b", *GENERATE)
    assert len(read("b/generations-predict.jsonl")) == 8
    with pytest.raises(SystemExit):
        grit("test", "--output=b", *GENERATE)
    assert "generations-predict.jsonl" in capsys.readouterr().err
    grit("test", "--output=b", "--overwrite", *GENERATE)
    assert {path.name for path in Path("b").glob("generations-*")} == {"generations-test.jsonl"}


def test_a_shipped_config_generates_in_its_test(tiny: list[str]) -> None:
    main(["test", "--config=boolq", *tiny, "--output=b"])
    assert len(read("b/generations-test.jsonl")) == 8


def test_an_answer_beyond_the_context_is_one_line_that_names_the_settings(
    grit: Grit, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        grit("test", "--output=b", "--model.generation.max_new_tokens=120")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.generation.max_new_tokens" in error
    assert "data.max_length" in error
