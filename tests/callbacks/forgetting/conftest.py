"""A module that learns in a few steps, and a probe of a text and some questions, for every test of ForgettingProbe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from grit_lightning.callbacks import ForgettingProbe
from grit_lightning.forgetting import TextData
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.module import GritLitModule

Factory = Callable[..., Any]

TEXT = "The cat sat on the mat, and the dog ran after the cat. " * 6
QUESTIONS: list[dict[str, Any]] = [
    {"question": f"Is {n} even?", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "AB"[n % 2]}
    for n in range(5)
]
QUESTIONS[-1]["question"] = "very " * 40 + QUESTIONS[-1]["question"]  # longer than the context of 128 bytes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let pass what Lightning says about runs without validation."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            ignored = "ignore:You defined a `validation_step` but have no `val_dataloader`"
            item.add_marker(pytest.mark.filterwarnings(ignored))


@pytest.fixture
def probe(tmp_path: Path, tiny_backbone_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ForgettingProbe]:
    """A factory of probes: 7 blocks of 32 tokens of one text, and 5 questions; keywords override."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    (data / "prose.txt").write_text(TEXT)
    (data / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    def make(**overrides: Any) -> ForgettingProbe:
        settings: dict[str, Any] = {
            "texts": [TextData(str(data / "prose.txt"))],
            "zero_shot": [{"schema": "arc_easy", "source": str(data / "arc.jsonl")}],
            "block_size": 32,
            "max_blocks": 7,
            "batch_size": 3,
            "tokenizer": str(tiny_backbone_dir),
        }
        return ForgettingProbe(**(settings | overrides))

    return make


@pytest.fixture
def quick_module(make_tiny_llama: Factory, lora_config: Factory) -> Factory:
    """A module that learns in a few steps, with dropout; keywords override."""

    def make(adapter: Mapping[str, Any] | None = None, **overrides: Any) -> GritLitModule:
        settings: dict[str, Any] = {
            "geometry": GeometryConfig(kfac_update_freq=2, kfac_min_samples=1),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            "lr_scheduler": None,
        }
        torch.manual_seed(3)
        config = lora_config(**({"lora_dropout": 0.2} | dict(adapter or {})))
        return GritLitModule(make_tiny_llama(), config, **(settings | overrides))

    return make


@pytest.fixture
def text() -> str:
    """What the probe's text holds."""
    return TEXT


@pytest.fixture
def lines() -> Callable[[Path, str], list[dict[str, Any]]]:
    """Reads a log of a run folder, without the times."""

    def read(folder: Path, name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "time"} for line in found]

    return read


@pytest.fixture
def summary() -> Callable[[Path], dict[str, Any]]:
    """Reads the summary.json of a run folder."""
    return lambda folder: json.loads((folder / "summary.json").read_text())
