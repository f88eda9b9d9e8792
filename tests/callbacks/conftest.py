"""Fixtures of the callbacks' tests: a tiny module, its data, and a Trainer that keeps quiet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.module import GritLitModule


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets pass what Lightning's Trainer says about its own dependencies and about toy data."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in (
                "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
                "ignore:The '.*_dataloader' does not have many workers",
                "ignore:The number of training batches .* is smaller than the logging interval",
                "ignore:You're resuming from a checkpoint that ended before the epoch ended",
                "ignore:You are trying to `self.log.*barebones",
                "ignore:Checkpoint directory .* exists and is not empty",
            ):
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture
def make_module(make_tiny_llama: Callable[..., Any], lora_config: Callable[..., Any]) -> Callable[..., GritLitModule]:
    """A factory of modules on the tiny Llama, LoRA rank 4 on q_proj and v_proj; `geometry=None` trains plain LoRA."""

    every_second_step = GeometryConfig(kfac_update_freq=2, kfac_min_samples=8)

    def make(geometry: GeometryConfig | None = every_second_step) -> GritLitModule:
        return GritLitModule(make_tiny_llama(), lora_config(), geometry)

    return make


@pytest.fixture
def loader(random_batch: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., DataLoader[Any]]:
    """A factory of loaders over n ready-made batches."""

    def make(batches: int = 8) -> DataLoader[Any]:
        return DataLoader([random_batch(seed=seed) for seed in range(batches)], batch_size=None)  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """A factory of CPU Trainers that write into tmp_path and show nothing; keywords override."""

    def make(**overrides: Any) -> pl.Trainer:
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": tmp_path,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "max_epochs": 1,
        }
        return pl.Trainer(**(settings | overrides))

    return make


@pytest.fixture
def read_metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads the metrics.jsonl of a run folder."""

    def read(folder: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return read


@pytest.fixture
def geometry(make_tiny_llama: Callable[..., Any], lora_config: Callable[..., Any]) -> RankSpaceGeometry:
    """Four layers of rank 4 with random factors and no statistics."""
    model = get_peft_model(make_tiny_llama(), lora_config()).double()
    geometry = RankSpaceGeometry(model, GeometryConfig(kfac_min_samples=10))
    for site in geometry.groups[0].sites:
        nn.init.normal_(site.up.weight)
    return geometry


@pytest.fixture
def rotated() -> Callable[..., Tensor]:
    """Symmetric matrices `[L, r, r]` with given eigenvalues in random directions."""

    def make(spectra: list[list[float]], seed: int = 0) -> Tensor:
        values = torch.tensor(spectra)
        noise = torch.randn(*values.shape, values.shape[-1], generator=torch.Generator().manual_seed(seed))
        q = torch.linalg.qr(noise).Q
        return (q * values.unsqueeze(-2)) @ q.mT

    return make


@pytest.fixture
def observe() -> Callable[..., None]:
    """Puts covariances, one for all layers or `[L, r, r]`, in place of measured ones; Σ_g is the identity if not given."""

    def put(geometry: RankSpaceGeometry, a_cov: Tensor, g_cov: Tensor | None = None, tokens: int = 1000) -> None:
        (group,) = geometry.groups
        shape = (len(group.sites), group.r, group.r)
        group.statistics.total.a = a_cov.expand(shape).clone()
        group.statistics.total.g = (torch.eye(group.r) if g_cov is None else g_cov).expand(shape).clone()
        group.statistics.total.weight = torch.ones(len(group.sites))
        group.counts.tokens += tokens

    return put


@pytest.fixture
def updates() -> Callable[[RankSpaceGeometry], list[Tensor]]:
    """B A of every layer."""

    def products(geometry: RankSpaceGeometry) -> list[Tensor]:
        return [site.up.weight.detach() @ site.down.weight.detach() for site in geometry.groups[0].sites]

    return products
