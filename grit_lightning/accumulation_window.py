"""The micro-batches between two optimizer steps: what is known about them, and whether their step may be taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grit_lightning.distributed.collectives import process_count, sum_over_processes
from grit_lightning.errors import DivergedError, InvalidValueError


class ClosedWindow(NamedTuple):
    """What a window that has come to its end says.

    Attributes:
        loss_sums: float32 `[2]`: sum of the losses of this process's micro-batches, and how many of them had labels.
        finite: Whether the gradients are finite, and so the step can be taken.
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
            gradients: Those of the trained parameters, by now the same on all processes. Those of an epoch's last window,
                which may be shorter than the others, are brought to full size in place.
            size: Micro-batches of a full window, by which Lightning has divided the loss.
            step: Number of the optimizer step, for messages.
            scaled: Whether a gradient scaler is there to skip a step whose gradients are not finite.

        Raises:
            FloatingPointError: If a loss is not finite, or a gradient is not and nobody would skip the step.
            ValueError: If no micro-batch of the window had a label token.
        """
        losses, self._losses = torch.stack(self._losses), []
        micro_batches, self.micro_batches = self.micro_batches, 0
        if micro_batches < size:
            torch._foreach_mul_(gradients, size / micro_batches)
        finite = _require_learnable(losses, gradients, step, scaled)
        return ClosedWindow(losses.sum(0), finite)

    def state_dict(self, trained: Mapping[str, nn.Parameter]) -> dict[str, Any] | None:
        """Return the window under way with the gradients gathered in it, None between two windows; a collective.

        Gradients are the means over all processes, to which they add up to the same mean as those of each process would.

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
        """Go on in the middle of a window.

        Args:
            state: From `state_dict`; None leaves the window as it is.
            trained: The trained parameters, by name; they get their gradients back.
            device: Where losses are computed.
        """
        if state is None:
            return
        self.micro_batches = state["micro_batches"]
        self._losses = [loss.to(device) for loss in state["losses"]]
        for name, parameter in trained.items():
            if name in state["gradients"]:
                parameter.grad = state["gradients"][name].to(parameter.device)


def _require_learnable(losses: Tensor, gradients: list[Tensor], step: int, scaled: bool) -> bool:
    """Return whether the gradients are finite; raise as `AccumulationWindow.close` says, alike on every process.

    Losses `[M, 2]` are this process's own: of each micro-batch, and whether it had labels. Gradients are everybody's.
    """
    norm = torch.stack(torch._foreach_norm(gradients)).float().norm()
    (loss, learnt), length = losses.sum(0).tolist(), float(norm)
    others = " of all processes" if process_count() > 1 else ""
    if not math.isfinite(loss) or not (math.isfinite(length) or scaled):
        what = "loss" if not math.isfinite(loss) else f"gradient{others} is not finite, the loss"
        raise DivergedError(
            f"The training {what} is {losses[:, 0].tolist()} at optimizer step {step}. Nothing of this step was applied. "
            "Lower the learning rate, set trainer.gradient_clip_val, or use bfloat16 instead of float16."
        )
    if learnt == 0 and length == 0.0:
        raise InvalidValueError(
            f"None of the {len(losses)} micro-batches of optimizer step {step} has a label token, so there is nothing to "
            "learn. Look at the labels (−100 where nothing is learnt), or raise data.max_length if answers were cut off."
        )
    return math.isfinite(length)
