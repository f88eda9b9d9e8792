"""The micro-batches between two optimizer steps: their losses, and whether the step may be taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grit_lightning.distributed.collectives import process_count, sum_over_processes
from grit_lightning.errors import DivergedError, InvalidValueError


class ClosedWindow(NamedTuple):
    """The result of a window that has ended.

    Attributes:
        loss_sums: float32 `[2]`: sum of the losses of this process's micro-batches, and how many of them had labels.
        finite: Whether the gradients are finite, so that the step can be taken.
    """

    loss_sums: Tensor
    finite: bool


class AccumulationWindow:
    """Counts the micro-batches since the last optimizer step, and keeps their losses.

    Attributes:
        micro_batches: How many have had their backward pass.
    """

    def __init__(self) -> None:
        """Open the first window."""
        self.micro_batches = 0
        self._losses: list[Tensor] = []

    def add_loss(self, loss: Tensor, learns: Tensor) -> None:
        """Keep the loss of a micro-batch, and whether it had a label token (a scalar bool)."""
        self._losses.append(torch.stack([loss.detach().float(), learns.float()]))

    def finish_micro_batch(self) -> None:
        """Count a micro-batch whose backward pass is over."""
        self.micro_batches += 1

    def close(self, gradients: list[Tensor], size: int, *, step: int, scaled: bool) -> ClosedWindow:
        """Check the window before its optimizer step, and open the next one.

        Args:
            gradients: Gradients of the trained parameters, by now the same on all processes. An epoch's last window may be
                shorter than the others; its gradients are scaled up to a full window in place.
            size: Micro-batches of a full window, by which Lightning has divided the loss.
            step: Number of the optimizer step, for messages.
            scaled: Whether a gradient scaler will skip a step whose gradients are not finite.

        Raises:
            FloatingPointError: If a loss is not finite, or a gradient is not and no scaler would skip the step.
            ValueError: If no micro-batch of the window had a label token.
            RuntimeError: If nothing was told of its losses or backward passes.
        """
        if not (self._losses and self.micro_batches):
            raise RuntimeError(
                f"Optimizer step {step}: expected the losses and backward passes of its micro-batches, got {len(self._losses)} "
                f"losses and {self.micro_batches} backward passes. Call take_loss in training_step, and finish_micro_batch "
                "(on_after_backward in a LightningModule) after every backward pass."
            )
        losses, self._losses = torch.stack(self._losses), []
        micro_batches, self.micro_batches = self.micro_batches, 0
        if micro_batches < size:
            torch._foreach_mul_(gradients, size / micro_batches)
        finite = _require_learnable(losses, gradients, step, scaled)
        return ClosedWindow(losses.sum(0), finite)

    def state_dict(self, trained: Mapping[str, nn.Parameter]) -> dict[str, Any] | None:
        """Return the unfinished window with its gradients so far, or None between two windows; a collective.

        Gradients are saved as means over all processes, which leads to the same mean at the end of the window.

        Args:
            trained: The trained parameters, by name.
        """
        if self.micro_batches == 0:
            return None
        gradients = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        sum_over_processes(list(gradients.values()))
        torch._foreach_div_(list(gradients.values()), process_count())
        return {
            "micro_batches": self.micro_batches,
            "losses": [loss.cpu() for loss in self._losses],
            "gradients": {name: gradient.cpu() for name, gradient in gradients.items()},
        }

    def load_state_dict(
        self, state: Mapping[str, Any] | None, trained: Mapping[str, nn.Parameter], device: torch.device
    ) -> None:
        """Continue in the middle of a window.

        Args:
            state: From `state_dict`; None leaves the window as it is.
            trained: The trained parameters, by name; they get their gradients back.
            device: Device on which losses are computed.
        """
        if state is None:
            return
        self.micro_batches = state["micro_batches"]
        self._losses = [loss.to(device) for loss in state["losses"]]
        for name, parameter in trained.items():
            if name in state["gradients"]:
                parameter.grad = state["gradients"][name].to(parameter.device)


def _require_learnable(losses: Tensor, gradients: list[Tensor], step: int, scaled: bool) -> bool:
    """Return whether the gradients are finite; raise as `AccumulationWindow.close` does, on every process alike.

    Losses `[M, 2]` are this process's own: each micro-batch's loss, and whether it had labels. Gradients are of all processes.
    """
    norm = torch.stack(torch._foreach_norm(gradients)).float().norm()
    (loss, learnt), length = losses.sum(0).tolist(), float(norm)
    others = " of all processes" if process_count() > 1 else ""
    if not math.isfinite(loss) or not (math.isfinite(length) or scaled):
        what, found = "training loss", f"{losses[:, 0].tolist()}"
        if math.isfinite(loss):
            what, found = f"gradient{others}", f"one that is not, at a loss of {found}"
        raise DivergedError(
            f"Optimizer step {step}: expected a finite {what}, got {found}. The step was not taken. Lower the learning rate, "
            "set trainer.gradient_clip_val, or use bfloat16 instead of float16."
        )
    if learnt == 0 and length == 0.0:
        raise InvalidValueError(
            f"Optimizer step {step}: expected a label token in at least one of {len(losses)} micro-batches, got none. Look at "
            "the labels (−100 where nothing is learnt), or raise data.max_length if answers were cut off."
        )
    return math.isfinite(length)
