"""What is measured of the curvature of all layers.

To add a quantity of a spectrum, write it into `SPECTRAL_QUANTITIES`; `SpectraLogger` logs whatever is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grit_lightning import functional as F
from grit_lightning.geometry.rank_space import RankSpaceGeometry

SPECTRAL_QUANTITIES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "effective_rank": lambda values, energy: F.effective_rank(values, energy).float(),
    "participation_ratio": lambda values, energy: F.participation_ratio(values),
    "spectral_entropy": lambda values, energy: F.spectral_entropy(values),
    "trace": lambda values, energy: values.sum(-1),
}
"""By name, functions of descending eigenvalues `[L, r]` and the share of energy that counts, to `[L]`."""


class Measurements(NamedTuple):
    """All layers at one time."""

    quantities: dict[str, dict[str, float]]
    """`{name: {layer: value}}`, layers by their `short_name`."""
    spectra: dict[str, Tensor]
    """All eigenvalues, `{spectrum_a | spectrum_g: [layers · r]}`."""


def measure_layers(geometry: RankSpaceGeometry, energy: float) -> Measurements:
    """Measure the effective rank of every layer, and every spectral quantity of its Σ_a and Σ_g.

    Args:
        geometry: Whose layers; its statistics must have been reduced.
        energy: Share of energy that `effective_rank` counts directions for, in (0, 1].

    Returns:
        Quantities `rank`, then `<quantity>_a` and `<quantity>_g`; and the spectra.
    """
    quantities: dict[str, dict[str, float]] = {}
    spectra: dict[str, list[Tensor]] = {}
    for group in geometry.groups:
        columns = {"rank": group.ranks.float()}
        for side, cov in (("a", group.a_cov.cpu()), ("g", group.g_cov.cpu())):
            values, _ = F.eigenbasis(cov)
            columns |= {f"{name}_{side}": measure(values, energy) for name, measure in SPECTRAL_QUANTITIES.items()}
            spectra.setdefault(f"spectrum_{side}", []).append(values.flatten())
        layers = [short_name(site.name) for site in group.sites]
        for name, column in columns.items():
            quantities.setdefault(name, {}).update(zip(layers, column.tolist(), strict=True))
    return Measurements(quantities, {name: torch.cat(parts) for name, parts in spectra.items()})


def short_name(layer: str) -> str:
    """Drop PEFT's wrapping prefix: `base_model.model.model.layers.0.mlp.up_proj` → `model.layers.0.mlp.up_proj`."""
    return layer.removeprefix("base_model.model.")
