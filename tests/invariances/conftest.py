"""Runs that must reproduce the `truth` of tests/conftest.py, whatever is done to their batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.geometry.rank_space import RankSpaceGeometry

Batch = dict[str, Tensor]
Covariances = dict[str, tuple[Tensor, Tensor]]


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def assert_agrees() -> Callable[..., None]:
    """`assert_agrees(geometry, covariances, a=…, g=…)`: relative Frobenius errors of all layers are below `a` and `g`."""

    def check(geometry: RankSpaceGeometry, expected: Covariances, *, a: float = 1e-5, g: float = 1e-4) -> None:
        assert geometry.layers.keys() == expected.keys()
        errors = {
            name: (_relative_error(view.a_cov, expected[name][0]), _relative_error(view.g_cov, expected[name][1]))
            for name, view in geometry.layers.items()
        }
        assert all(error_a < a and error_g < g for error_a, error_g in errors.values()), errors

    return check


@pytest.fixture
def make_module(
    make_tiny_llama: Callable[..., Any], lora_config: Callable[..., Any], randomize: Callable[..., Any]
) -> Callable[..., GritLitModule]:
    """A factory of built modules whose weights do not move (SGD at rate 0), so that all steps see the same model."""

    def make(llama: dict[str, Any] | None = None, **overrides: Any) -> GritLitModule:
        settings: dict[str, Any] = {
            "backbone": make_tiny_llama(**(llama or {})),
            "adapter": lora_config(),
            "geometry": GeometryConfig(kfac_update_freq=1, kfac_min_samples=1, cov_averaging="mean"),
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0),
            "lr_scheduler": None,
        }
        module = GritLitModule(**(settings | overrides))
        module.configure_model()
        randomize(module.peft_model)
        return module

    return make


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """`fit(module, batches, **trainer_settings)` runs one epoch on the CPU, without logger or checkpoints."""

    def run(module: GritLitModule, batches: list[Batch], validation: list[Batch] = (), **overrides: Any) -> pl.Trainer:
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": len(validation),
            "default_root_dir": tmp_path,
        }
        trainer = pl.Trainer(**(settings | overrides))
        trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(list(validation), batch_size=None))
        return trainer

    return run


@pytest.fixture
def measure() -> Callable[..., RankSpaceGeometry]:
    """`measure(model, batches)`: a geometry that has seen one accumulation window, driven without Lightning.

    `weight` multiplies the loss, `seed` draws dropout's masks, `forward` stands in for calling the model.
    """

    def run(
        model: nn.Module,
        batches: list[Batch],
        *,
        config: GeometryConfig | None = None,
        weight: float = 1.0,
        seed: int = 0,
        forward: Callable[..., Any] | None = None,
    ) -> RankSpaceGeometry:
        geometry = RankSpaceGeometry(model, config or GeometryConfig())
        torch.manual_seed(seed)
        for batch in batches:
            tokens = (batch["labels"][:, 1:] != -100).sum()
            geometry.start_micro_batch(batch["attention_mask"], tokens * float(len(batches)))
            loss = (model if forward is None else forward)(**batch, use_cache=False).loss
            (weight * loss / len(batches)).backward()
            geometry.finish_micro_batch()
        geometry.step()
        return geometry

    return run
