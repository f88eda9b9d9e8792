"""A module that learns in a few steps, general text, and a retention of it, for every test of `Retention`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from grit_lightning.callbacks import Retention
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.module import GritLitModule

Factory = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let pass what Lightning says about runs without validation."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            ignored = "ignore:You defined a `validation_step` but have no `val_dataloader`"
            item.add_marker(pytest.mark.filterwarnings(ignored))


@pytest.fixture
def general(tmp_path: Path) -> Path:
    """A file of general text."""
    path = tmp_path / "general.txt"
    path.write_text(
        "".join(
            f"Line {n}: {n * n} apples, {n**3 % 97} pears and a {'red' if n % 2 else 'blue'} bird.\n" for n in range(40)
        )
    )
    return path


@pytest.fixture
def retention(general: Path, tiny_backbone_dir: Path) -> Callable[..., Retention]:
    """A factory of callbacks: 12 blocks of 32 tokens, two a micro-batch, at every step; keywords override."""

    def make(**overrides: Any) -> Retention:
        settings: dict[str, Any] = {
            "texts": [{"source": str(general)}],
            "every_n_steps": 1,
            "block_size": 32,
            "max_blocks": 12,
            "batch_size": 2,
            "tokenizer": str(tiny_backbone_dir),
        }
        return Retention(**(settings | overrides))

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
