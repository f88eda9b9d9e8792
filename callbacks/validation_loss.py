"""The loss on the validation rows, outside of Lightning's own validation, and the strongest edit that it allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from grit_lightning.batches import IGNORED, counted_rows, label_token_count, learnt_labels
from grit_lightning.distributed.collectives import sum_over_processes
from grit_lightning.distributed.strategies import WholeAdapterStrategy
from grit_lightning.editing.front import FIRST_STRENGTH, bisect_log
from grit_lightning.forgetting.without_trace import evaluating_without_trace
from grit_lightning.module import GritLitModule

EVALUATIONS = 8
"""The most strengths that are measured."""


class Strength(NamedTuple):
    """A strength of an edit, and the losses on the validation rows without and with it; nats per predicted token."""

    mu: float
    loss_before: float
    loss_after: float


def require_validation(setting: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Check that there are validation rows to measure.

    Raises:
        MisconfigurationException: If there are none, or the module is no `GritLitModule`, whose batches are known.
    """
    if not trainer.enable_validation or not isinstance(pl_module, GritLitModule):
        raise MisconfigurationException(
            f"{setting}: expected a GritLitModule with validation rows to measure the task on, got {type(pl_module).__name__} "
            f"{'with' if trainer.enable_validation else 'without'} them. Give validation rows (and a trainer.limit_val_batches "
            "above 0), or set it to null and choose mu."
        )


@torch.no_grad()
def validation_loss(trainer: pl.Trainer) -> float:
    """Measure the loss on the validation rows as validation would, without leaving a trace; a collective."""
    module = trainer.lightning_module
    model: Any = trainer.strategy.model if isinstance(trainer.strategy, WholeAdapterStrategy) else module
    sums = torch.zeros(2, dtype=torch.float64, device=module.device)
    with evaluating_without_trace(model, module.device):
        for batch in _batches(trainer):
            counted = {**batch, "labels": batch["labels"].masked_fill(~counted_rows(batch)[:, None], IGNORED)}
            with trainer.precision_plugin.forward_context():
                loss = model(counted, trim=True).loss
            tokens = label_token_count(learnt_labels(counted))
            if tokens:  # a mean over nothing is NaN
                sums += torch.stack([loss.double() * tokens, tokens.double()])
    sum_over_processes([sums])
    return float(sums[0] / sums[1].clamp(min=1))


def strongest_within(tolerance: float, loss_at: Callable[[float], float]) -> Strength:
    """Find the largest μ at which the loss is at most `tolerance` above that at 0, by bisection; μ is 0 if there is none.

    Args:
        tolerance: In nats per predicted token, ≥ 0.
        loss_at: Measures the loss at a strength.
    """
    losses = {0.0: loss_at(0.0)}

    def keeps(mu: float) -> bool:
        losses[mu] = loss_at(mu)
        return losses[mu] - losses[0.0] <= tolerance

    mu = bisect_log(keeps, FIRST_STRENGTH, EVALUATIONS) or 0.0
    return Strength(mu, losses[0.0], losses[mu])


def _batches(trainer: pl.Trainer) -> Iterator[Mapping[str, Tensor]]:
    if trainer.val_dataloaders is None:  # no validation has come yet
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    found: Any = trainer.val_dataloaders
    loaders = list(found.values()) if isinstance(found, Mapping) else found if isinstance(found, list) else [found]
    for index, (loader, batches) in enumerate(zip(loaders, trainer.num_val_batches, strict=True)):
        for batch in islice(loader, None if batches == float("inf") else int(batches)):
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=index)
