"""A tiny model and a few rows of BoolQ and of IMDb as command-line words, and the program run inside the test's own folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from grit_lightning.cli.program import main

from ..datamodules.task_cases import CASES

Grit = Callable[..., None]


@pytest.fixture(autouse=True)
def _own_folder_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):  # seed_everything leaves its seed in the environment
        del os.environ[name]


@pytest.fixture(scope="session")
def boolq_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 16 training and twice 8 other rows, which are BoolQ's and IMDb's, the demo's task, at once."""
    folder = tmp_path_factory.mktemp("boolq")
    for split, count in (("train", 16), ("validation", 8), ("test", 8)):
        rows = [{"question": f"is {n} even", "passage": f"It is {n}.", "answer": n % 2 == 0} for n in range(count)]
        rows = [row | {"text": row["passage"], "label": int(row["answer"])} for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def on_task(
    tiny: list[str], tiny_backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[str]]:
    """`on_task(name)`: like `tiny`, on a few rows of that task and with a context in which its prompts fit."""
    backbone = shutil.copytree(tiny_backbone_dir, tmp_path_factory.mktemp("roomy") / "backbone")
    for file, setting in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        content = json.loads((backbone / file).read_text(encoding="utf-8"))
        (backbone / file).write_text(json.dumps(content | {setting: 512}), encoding="utf-8")

    def words(task: str) -> list[str]:
        folder = tmp_path_factory.mktemp(task)
        for split, count in (("train", 16), ("validation", 8), ("test", 8)):
            lines = [json.dumps(CASES[task].row(n)) + "\n" for n in range(count)]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        return [*tiny, f"--model.backbone={backbone}", f"--data.source={folder}", "--data.max_length=384"]

    return words


@pytest.fixture(scope="session")
def tiny(tiny_backbone_dir: Path, boolq_dir: Path) -> list[str]:
    """Words that turn any shipped configuration into seconds of work: a tiny float32 model, 24 rows, no bars."""
    return [
        f"--model.backbone={tiny_backbone_dir}",
        "--model.dtype=float32",
        "--model.quantization=null",
        f"--data.source={boolq_dir}",
        "--data.max_length=128",
        "--data.batch_size=4",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
    ]


@pytest.fixture(scope="session")
def grit(tiny: list[str]) -> Grit:
    """Runs a subcommand of the demo on the tiny model for 4 steps: `grit("fit", "--output=runs/a")`."""

    def run(subcommand: str, *words: str) -> None:
        main([subcommand, "--config=demo", *tiny, "--trainer.max_steps=4", *words])

    return run


@pytest.fixture(scope="session")
def _trained(grit: Grit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    before = dict(os.environ)
    grit("fit", f"--output={folder}", "--model.adapter.r=5", "--model.adapter.lora_alpha=7")
    for name in set(os.environ) - set(before):
        del os.environ[name]
    return folder


@pytest.fixture
def trained(_trained: Path, tmp_path: Path) -> Path:
    """The folder `a`: a finished run of 4 steps at rank 5, alpha 7."""
    return Path(shutil.copytree(_trained, tmp_path / "a", symlinks=True))
