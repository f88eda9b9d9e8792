"""People with a file: from each kind of it to an adapter that plain PEFT loads, with the shipped configurations alone."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from grit_lightning.cli.program import main

ROUNDS = range(24)


def _pairs(folder: Path) -> Path:
    with (folder / "faq.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("prompt", "completion"), *((f"What is {n}?", f"It is {n}.") for n in ROUNDS)])
    return folder / "faq.csv"


def _chats(folder: Path) -> Path:
    def chat(n: int) -> str:
        roles = ("system", "user", "assistant", "user", "assistant")
        return json.dumps({"messages": [{"role": role, "content": f"{role} {n}"} for role in roles]})

    (folder / "chats.jsonl").write_text("\n".join(map(chat, ROUNDS)))
    return folder / "chats.jsonl"


def _notes(folder: Path) -> Path:
    (folder / "notes").mkdir()
    for n in ROUNDS:
        (folder / "notes" / f"{n}.txt").write_text(f"Note {n}. " * 8)
    return folder / "notes"


def _labelled(folder: Path) -> Path:
    rows = [(f"Text {n}.", ("red", "green", "blue")[n % 3]) for n in ROUNDS]
    with (folder / "labelled.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return folder / "labelled.csv"


@pytest.mark.filterwarnings("ignore:model.generation. the rows of TextDataModule have no prompts")
@pytest.mark.parametrize(
    ("config", "write", "measured"),
    [
        ("instruct", _pairs, {"test/loss", "test/rouge1", "test/bleu"}),
        ("instruct", _chats, {"test/loss", "test/rouge1", "test/bleu"}),
        ("text", _notes, {"test/loss"}),
        ("classify", _labelled, {"test/loss", "test/accuracy", "test/precision", "test/recall", "test/f1"}),
    ],
    ids=["pairs", "chats", "notes", "labels"],
)
def test_a_file_becomes_an_adapter_that_plain_peft_loads(
    config: str, write: Callable[[Path], Path], measured: set[str], tmp_path: Path, tiny_backbone_dir: Path
) -> None:
    words = ["--config", config, f"--data.source={write(tmp_path)}", f"--model.backbone={tiny_backbone_dir}"]
    words += ["--model.dtype=float32", "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--output=runs/mine"]
    words += ["--trainer.log_every_n_steps=1"]
    words += ["--model.generation.max_new_tokens=4", "--model.generation.max_rows=2"]
    if config == "text":
        words += ["--data.max_length=64"]
    main(["fit", *words])
    main(["test", "--ckpt_path=runs/mine/checkpoints/last.ckpt", "--trainer.accelerator=cpu"])
    assert measured <= json.loads(Path("runs/mine/summary.json").read_text())["metrics"]["after"].keys()
    main(["export", "--ckpt_path=runs/mine/checkpoints/last.ckpt", "--output=mine"])
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_backbone_dir, dtype=torch.float32)
    adapted: Any = PeftModel.from_pretrained(model, "mine")
    prompt = AutoTokenizer.from_pretrained(tiny_backbone_dir)("Hello", return_tensors="pt")
    assert adapted.generate(**prompt, max_new_tokens=2).shape[1] == prompt["input_ids"].shape[1] + 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"messages": [{"role": "user", "content": "q"}]}\n' * 4, "row 3: expected a turn of the assistant to learn"),
        ("", "expected rows under the task's columns, got none"),
    ],
)
def test_bad_rows_end_a_run_in_one_sentence_and_leave_nothing(
    content: str, problem: str, tmp_path: Path, tiny_backbone_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(SystemExit):
        main(["fit", "--config=instruct", "--data.source=mine.jsonl", f"--model.backbone={tiny_backbone_dir}"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert problem in error
    assert "Traceback" not in error
    assert sorted(path.name for path in Path().iterdir() if path.name != "cache") == ["mine.jsonl"]
