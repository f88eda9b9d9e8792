"""Logs the spectra of every layer: what TensorBoard's dashboards of effective rank are made of."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from grit_lightning.callbacks.base import GeometryCallback
from grit_lightning.errors import require
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.telemetry.quantities import measure_layers, short_name
from grit_lightning.telemetry.rank_map import rank_map


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
        require("SpectraLogger", "energy", 0.0 < energy <= 1.0, "a number in (0, 1]", energy)
        self.energy = energy
        self.per_layer = per_layer

    def act(self, trainer: pl.Trainer, geometry: RankSpaceGeometry) -> None:
        """Reduce, measure, log."""
        geometry.reduce()
        quantities, spectra = measure_layers(geometry, self.energy)
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
