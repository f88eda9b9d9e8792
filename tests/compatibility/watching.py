"""Watches one run from inside, for the checks after it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from grit_lightning import GritLitModule

from .cases import TOKENS, Case, batches


class WrongError(Exception):
    """A run went through, and what it gave is not what was asked for."""


def require(holds: bool, found: str) -> None:
    if not holds:
        raise WrongError(found)


class Run(Callback):
    """Watches one run.

    Attributes:
        losses: Of every micro-batch.
        rates: Learning rates of the first group, of every optimizer step.
        learnt: Names of the trained parameters that have had a gradient other than zero.
        start: Trained parameters before the first step.
        end: Trained parameters after the last one.
        logits: What the model says before the first step.
        fits: How often training has started.
        tokens: Real tokens since it last did.
        last_rate: Learning rate after the last step.
    """

    def __init__(self, case: Case, module: GritLitModule) -> None:
        self.case, self.module = case, module
        self.losses: list[Tensor] = []
        self.rates: list[float] = []
        self.fits = self.tokens = 0
        self.last_rate = 0.0
        self.learnt: set[str] = set()
        self._tokens_of_batch = 0
        self.start: dict[str, Tensor] = {}
        self.end: dict[str, Tensor] = {}
        self.logits = torch.zeros(())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.losses, self.rates, self.tokens = [], [], 0  # finders of rates and batch sizes have runs of their own
        self.fits += 1
        if not self.start:
            self.start = self.trained()
            self.logits = logits(self.module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))
        named = self.module.named_parameters()
        self.learnt |= {name for name, value in named if value.grad is not None and value.grad.any()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._tokens_of_batch = int(batch["attention_mask"].sum())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tokens += self._tokens_of_batch  # once for every evaluation: LBFGS has several in a step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())
        self.end = self.trained()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_rate = float(trainer.optimizers[0].param_groups[0]["lr"])

    def trained(self) -> dict[str, Tensor]:
        """Return a copy of the trained parameters by name."""
        return {name: value.detach().clone() for name, value in self.module.named_parameters() if value.requires_grad}


def logits(model: GritLitModule | torch.nn.Module) -> Tensor:
    """Return what a model says about the real tokens of one batch."""
    network = model.peft_model if isinstance(model, GritLitModule) else model
    (batch,) = batches(1)
    mask = batch["attention_mask"]
    return logits_of(network, batch["input_ids"], mask)[mask.bool()]


@torch.no_grad()
def logits_of(network: torch.nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return float32 logits in evaluation mode, always in the same random state, without those of virtual tokens."""
    was_training, network = network.training, network.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = network(input_ids=ids, attention_mask=mask, use_cache=False).logits
    network.train(was_training)
    return result[:, -TOKENS:].float()
