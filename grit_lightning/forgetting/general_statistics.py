"""Statistics of general text in the middle of a training that does not notice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from grit_lightning.batches import label_token_count
from grit_lightning.forgetting.dealt_blocks import DealtBlocks
from grit_lightning.forgetting.likelihood import make_batch
from grit_lightning.forgetting.without_trace import evaluating_without_trace
from grit_lightning.geometry.cross_moments import CrossMoments
from grit_lightning.geometry.rank_space import RankSpaceGeometry

LossOf = Callable[[dict[str, Tensor]], Tensor]
"""Runs the model over a batch of `input_ids`, `attention_mask` and `labels` and returns the mean loss of its label tokens."""


class GeneralStatistics:
    """Takes blocks of general text through the model, whose statistics enter a second estimate of the same layers.

    A micro-batch is one forward and one backward pass of `batch_size` blocks on every process, in evaluation mode. Gradients go
    to nothing but the hooks: no `.grad`, no reducer and no optimizer sees them, and no random number is drawn.

    Args:
        text: The blocks, equal on every process.
        estimate: From `RankSpaceGeometry.beside`.
        batch_size: Blocks in a micro-batch of a process.
        rank: Rank of this process.
        world_size: Number of processes.
        with_cross_moments: Measure what a penalty needs, too.

    Attributes:
        cross: Cross moments of the last micro-batch, if they are measured.
    """

    def __init__(
        self,
        text: DealtBlocks,
        estimate: RankSpaceGeometry,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        with_cross_moments: bool = False,
    ) -> None:
        """Remember what goes together."""
        self.text, self.estimate, self.batch_size = text, estimate, batch_size
        self.cross = CrossMoments(estimate) if with_cross_moments else None
        self._rank, self._world_size = rank, world_size
        sites = [site for group in estimate.groups for site in group.sites]
        factors = [factor for site in sites for factor in (site.down.weight, site.up.weight)]
        self._factors = [factor for factor in factors if factor.requires_grad]

    @property
    def micro_batches(self) -> int:
        """Micro-batches that all blocks take."""
        return -(-self.text.blocks // (self.batch_size * self._world_size))

    def measure(
        self,
        module: nn.Module,
        loss_of: LossOf,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[Any]],
        *,
        micro_batches: int = 1,
        scale: float = 1.0,
    ) -> None:
        """Take the next blocks of all processes into the estimate, as one window; a collective.

        Args:
            module: Whose parts are put into evaluation mode.
            loss_of: Runs the model.
            device: Where the batches belong.
            precision: Makes the context of a forward pass.
            micro_batches: How many micro-batches make the window.
            scale: Of 16-bit training, multiplies the loss so that gradients do not vanish.
        """
        with evaluating_without_trace(module, device), torch.enable_grad():
            for _ in range(micro_batches):
                blocks = self.text.deal(self.batch_size * self._world_size)[self._rank :: self._world_size]
                batch = make_batch(blocks, device)
                gradient_scale = label_token_count(batch["labels"]) / scale
                self.estimate.start_micro_batch(batch["attention_mask"], gradient_scale)
                if self.cross is not None:
                    self.cross.start(batch["attention_mask"], gradient_scale)
                with precision():
                    loss = loss_of(batch)
                torch.autograd.grad(loss * scale, self._factors, allow_unused=True)
                self.estimate.finish_micro_batch()
                if self.cross is not None:
                    self.cross.stop()
        self.estimate.finish_window()
        self.estimate.reduce()  # at once: the bits of a running sum depend on when it is taken, and a checkpoint takes it too

    def detach(self) -> None:
        """Remove the hooks of the cross moments; those of the estimate belong to the geometry that it is beside."""
        if self.cross is not None:
            self.cross.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the estimate and the place in the text; a collective."""
        return {
            "estimate": self.estimate.state_dict(),
            "dealt": self.text.dealt,
            "fingerprint": self.text.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, of the same text."""
        self.estimate.load_state_dict(state["estimate"])
        self.text.go_to(state["dealt"])
