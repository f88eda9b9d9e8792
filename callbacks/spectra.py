"""Logs the spectra of every layer: what TensorBoard's dashboards of effective rank are made of."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from grit_lightning import functional as F
from grit_lightning.callbacks.base import GeometryCallback
from grit_lightning.geometry.rank_space import RankSpaceGeometry


class SpectraLogger(GeometryCallback):
    """Logs spectral summaries of Σ_a and Σ_g, per layer and averaged, every few optimizer steps.

    Keys are `grit/<quantity>/<layer>`, and `grit/<quantity>` for the mean over layers. Quantities: `rank` (effective k),
    `effective_rank_a` and `_g` (directions that hold 90% of the energy), `participation_ratio_a`/`_g`,
    `spectral_entropy_a`/`_g` (nats), `trace_a`/`_g`. Events since the start are counted over all layers, and per layer where
    there were any: `rejected`, `fallbacks`, `escalations`. TensorBoard also gets the eigenvalues as histograms, and the
    effective ranks of all layers as one picture, `grit/rank_map`.

    Args:
        every_n_steps: Optimizer steps between two logs.
        start_step: First optimizer step that is logged.
        energy: Fraction of energy that `effective_rank` counts directions for, in (0, 1].
        per_layer: Log every layer; False logs the means only.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, every_n_steps: int = 50, start_step: int = 0, energy: float = 0.9, per_layer: bool = True
    ) -> None:
        """Check and remember the settings."""
        super().__init__(every_n_steps, start_step)
        if not 0.0 < energy <= 1.0:
            raise ValueError(f"SpectraLogger.energy must lie in (0, 1], got {energy}.")
        self.energy = energy
        self.per_layer = per_layer

    def act(self, trainer: pl.Trainer, geometry: RankSpaceGeometry) -> None:
        """Reduce, summarise, log."""
        geometry.reduce()
        quantities, spectra = self.summarise(geometry)
        totals = {f"grit/{name}": float(sum(layers.values()) / len(layers)) for name, layers in quantities.items()}
        totals |= {f"grit/{name}": float(count) for name, count in geometry.counters.items()}
        trainer.lightning_module.log_dict(totals, logger=False, batch_size=1)  # for callback_metrics
        if not trainer.is_global_zero:
            return
        if self.per_layer:
            totals |= {f"grit/{name}/{layer}": v for name, layers in quantities.items() for layer, v in layers.items()}
            totals |= {
                f"grit/{name}/{short_name(site.name)}": float(count)
                for group in geometry.groups
                for name, counts in group.counts.events().items()
                for site, count in zip(group.sites, counts, strict=True)
                if count
            }
        step = trainer.global_step - 1  # Lightning's loggers count from 0
        for logger in trainer.loggers:
            logger.log_metrics(totals, step=step)
            if isinstance(logger, TensorBoardLogger):
                for name, values in spectra.items():
                    logger.experiment.add_histogram(f"grit/{name}", values, step)
                logger.experiment.add_image("grit/rank_map", rank_map(geometry), step)

    def summarise(self, geometry: RankSpaceGeometry) -> tuple[dict[str, dict[str, float]], dict[str, torch.Tensor]]:
        """Return quantities `{name: {layer: value}}` and all eigenvalues `{spectrum_a | spectrum_g: [layers · r]}`."""
        quantities: dict[str, dict[str, float]] = {}
        spectra: dict[str, list[torch.Tensor]] = {}
        for group in geometry.groups:
            columns = {"rank": group.ranks.float()}
            for side, cov in (("a", group.a_cov.cpu()), ("g", group.g_cov.cpu())):
                values, _ = F.eigenbasis(cov)
                columns[f"effective_rank_{side}"] = F.effective_rank(values, self.energy).float()
                columns[f"participation_ratio_{side}"] = F.participation_ratio(values)
                columns[f"spectral_entropy_{side}"] = F.spectral_entropy(values)
                columns[f"trace_{side}"] = values.sum(-1)
                spectra.setdefault(f"spectrum_{side}", []).append(values.flatten())
            for name, column in columns.items():
                layers = quantities.setdefault(name, {})
                layers.update(zip((short_name(site.name) for site in group.sites), column.tolist(), strict=True))
        return quantities, {name: torch.cat(parts) for name, parts in spectra.items()}


def short_name(layer: str) -> str:
    """Drop PEFT's wrapping prefix: `base_model.model.model.layers.0.mlp.up_proj` → `model.layers.0.mlp.up_proj`."""
    return layer.removeprefix("base_model.model.")


def rank_map(geometry: RankSpaceGeometry, cell: int = 12) -> torch.Tensor:
    """Draw the effective ranks: a row a layer of the network, a column a kind of module, brighter for higher k / r.

    Args:
        geometry: Whose ranks.
        cell: Pixels per side of a cell.

    Returns:
        `[3, rows · cell, columns · cell]` in [0, 1]; black where a layer has no such module.
    """
    sites = [
        (site, int(rank)) for group in geometry.groups for site, rank in zip(group.sites, group.ranks, strict=True)
    ]
    rows = {name: row for row, name in enumerate(dict.fromkeys(_block(site.name) for site, _ in sites))}
    columns = {kind: column for column, kind in enumerate(dict.fromkeys(site.kind for site, _ in sites))}
    grid = torch.zeros(3, len(rows), len(columns))
    for site, rank in sites:
        share = rank / site.r
        grid[:, rows[_block(site.name)], columns[site.kind]] = torch.tensor([0.15 + 0.85 * share, 0.75 * share, 0.3])
    return grid.repeat_interleave(cell, 1).repeat_interleave(cell, 2)


def _block(layer: str) -> str:
    """Name up to the block's number: `…layers.0.mlp.up_proj` → `…layers.0`; the whole name if there is none."""
    parts = layer.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else layer
