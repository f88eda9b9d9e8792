"""What is measured of all layers, on covariances made by hand.

Proven here: every quantity agrees with its definition, worked out in plain Python; layers of groups of different rank come
together under their short names; eigenvalues of all layers are kept for histograms.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grit_lightning.telemetry.quantities import SPECTRAL_QUANTITIES, measure_layers

A = [[6.0, 3.0, 1.0], [1.0, 1.0, 0.0]]
G = [[0.5, 0.25, 0.25], [2.0, 0.0, 0.0]]


def group(names: list[str], ranks: list[int], a: list[list[float]], g: list[list[float]]) -> SimpleNamespace:
    """Stand in for a group of layers with these eigenvalues, in an order that still has to be sorted."""
    return SimpleNamespace(
        sites=[SimpleNamespace(name=f"base_model.model.{name}") for name in names],
        ranks=torch.tensor(ranks),
        a_cov=torch.diag_embed(torch.tensor(a).flip(-1)),
        g_cov=torch.diag_embed(torch.tensor(g).flip(-1)),
    )


@pytest.fixture
def geometry() -> Any:
    return SimpleNamespace(
        groups=[group(["up", "down"], [2, 3], A, G), group(["head"], [1], [[4.0, 1.0]], [[1.0, 1.0]])]
    )


def definition(quantity: str, values: list[float]) -> float:
    total = sum(values)
    return {
        "effective_rank": next(m for m in range(1, len(values) + 1) if sum(values[:m]) >= 0.9 * total),
        "participation_ratio": total**2 / sum(value**2 for value in values),
        "spectral_entropy": -sum(value / total * math.log(value / total) for value in values if value > 0),
        "trace": total,
    }[quantity]


@pytest.mark.parametrize("quantity", SPECTRAL_QUANTITIES)
def test_every_quantity_agrees_with_its_definition(geometry: Any, quantity: str) -> None:
    measured = measure_layers(geometry, energy=0.9).quantities
    for side, spectra in (("a", [*A, [4.0, 1.0]]), ("g", [*G, [1.0, 1.0]])):
        expected = dict(zip(("up", "down", "head"), (definition(quantity, values) for values in spectra), strict=True))
        assert measured[f"{quantity}_{side}"] == pytest.approx(expected, rel=1e-6)


def test_ranks_come_first_and_layers_by_their_short_names(geometry: Any) -> None:
    quantities = measure_layers(geometry, energy=0.9).quantities
    assert next(iter(quantities.items())) == ("rank", {"up": 2.0, "down": 3.0, "head": 1.0})
    assert len(quantities) == 1 + 2 * len(SPECTRAL_QUANTITIES)


def test_all_eigenvalues_are_kept(geometry: Any) -> None:
    spectra = measure_layers(geometry, energy=0.9).spectra
    torch.testing.assert_close(spectra["spectrum_a"], torch.tensor([*A[0], *A[1], 4.0, 1.0]))
    torch.testing.assert_close(spectra["spectrum_g"], torch.tensor([*G[0], *G[1], 1.0, 1.0]))
