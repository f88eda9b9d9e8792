"""Factories for the inputs of the maths tests: float64, seeded, batched over layers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20260101)


@pytest.fixture
def randn(rng: torch.Generator) -> Callable[..., Tensor]:
    """Normal float64 numbers of the given shape."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return draw


@pytest.fixture
def random_cov(randn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Well-conditioned covariances ``[layers, r, r]`` with spectra that decay from layer to layer alike."""

    def draw(layers: int, r: int, decay: float = 0.7) -> Tensor:
        vectors = torch.linalg.qr(randn(layers, r, r)).Q
        values = decay ** torch.arange(r, dtype=torch.float64) * (0.5 + randn(layers, 1).square())
        return vectors @ torch.diag_embed(values) @ vectors.mT

    return draw
