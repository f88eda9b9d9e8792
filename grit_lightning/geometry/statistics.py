"""What has been measured of the layers that share one LoRA rank: sums over tokens, and counts that all processes share.

Shapes: L layers, r their rank. Sums are float32 `[L, r, r]` whatever torch's default dtype, counts int64 `[L]`, both on
the adapter's device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grit_lightning import functional as F


class Statistics:
    """Token-weighted sums of a aᵀ and g gᵀ `[L, r, r]` with the weight `[L]` (tokens) they were summed over."""

    def __init__(self, layers: int, r: int) -> None:
        """Start empty."""
        self.a = torch.zeros(layers, r, r, dtype=torch.float32)
        self.g = torch.zeros(layers, r, r, dtype=torch.float32)
        self.weight = torch.zeros(layers, dtype=torch.float32)

    def tensors(self) -> list[Tensor]:
        """Return the three tensors, for transport and persistence."""
        return [self.a, self.g, self.weight]

    def to(self, device: torch.device) -> None:
        """Move to `device`."""
        self.a, self.g, self.weight = (tensor.to(device) for tensor in self.tensors())

    def accumulate(self, other: Statistics, decay: float = 1.0) -> None:
        """Fade what is here by `decay`, add `other` and empty it."""
        self.a = F.accumulate(self.a, other.a, decay)
        self.g = F.accumulate(self.g, other.g, decay)
        self.weight = F.accumulate(self.weight, other.weight, decay)
        other.clear()

    def keep_where(self, layers: Tensor) -> None:
        """Set the sums of all layers but those that `layers` `[L]` bool marks to zero, in place."""
        for tensor in self.tensors():
            tensor.masked_fill_(~layers.view(-1, *[1] * (tensor.ndim - 1)), 0.0)

    def clear(self) -> None:
        """Set to zero in place."""
        for tensor in self.tensors():
            tensor.zero_()

    def copy_(self, values: list[Tensor]) -> None:
        """Take over the values of `tensors()` of another one."""
        for tensor, value in zip(self.tensors(), values, strict=True):
            tensor.copy_(value)


class RunningStatistics:
    """Statistics on their way from a micro-batch to the running estimate.

    Attributes:
        micro: Sums of the micro-batch under way.
        window: Finite micro-batches of the accumulation window under way.
        local: Finished windows of this process that have not been summed over processes yet.
        total: The running estimate, equal on all processes.
        gradient_gram: `[L, r, r]`, ∇Bᵀ∇B summed over the steps taken at a reduced rank, fading like the statistics: the
            only evidence that there is on dropped directions.
        references: Matrices `[L, r, r]` by name that follow every change of coordinates as Σ_a does, for comparison later.
    """

    def __init__(self, layers: int, r: int) -> None:
        """Start empty."""
        self.micro, self.window, self.local, self.total = (Statistics(layers, r) for _ in range(4))
        self.gradient_gram = torch.zeros(layers, r, r, dtype=torch.float32)
        self.references: dict[str, Tensor] = {}

    def add_gradients(self, gradients: Tensor, layers: Tensor, decay: float) -> None:
        """Add raw gradients of B `[n, d_out, r]` of the layers `[n]` to `gradient_gram`, unless they are not finite."""
        gram = gradients.mT @ gradients
        gram = torch.where(gram.isfinite().all(-1).all(-1).view(-1, 1, 1), gram, 0.0)
        self.gradient_gram[layers] = decay * self.gradient_gram[layers] + gram

    def change_coordinates(self, maps: F.ReprojectionMaps) -> None:
        """Carry the running estimate, and what is compared with it later, through the maps of a reprojection."""
        self.total.a, self.total.g = F.carry_covariances(self.total.a, self.total.g, maps)
        self.gradient_gram, *references = (
            F.carry_covariances(matrix, matrix, maps)[0] for matrix in (self.gradient_gram, *self.references.values())
        )
        self.references = dict(zip(self.references, references, strict=True))

    def to(self, device: torch.device) -> None:
        """Move to `device`."""
        for part in (self.micro, self.window, self.local, self.total):
            part.to(device)
        self.gradient_gram = self.gradient_gram.to(device)
        self.references = {name: tensor.to(device) for name, tensor in self.references.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the micro-batch under way, as CPU tensors."""
        parts = {"window": self.window, "local": self.local, "total": self.total}
        sums = {name: [tensor.detach().cpu().clone() for tensor in part.tensors()] for name, part in parts.items()}
        return {
            **sums,
            "gradient_gram": self.gradient_gram.detach().cpu().clone(),
            "references": {name: tensor.detach().cpu().clone() for name, tensor in self.references.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, part in (("window", self.window), ("local", self.local), ("total", self.total)):
            part.copy_(state[name])
        device = self.total.a.device
        self.gradient_gram = state["gradient_gram"].to(device).clone()
        self.references = {name: tensor.to(device).clone() for name, tensor in state["references"].items()}


class LayerCounts:
    """Counts `[L]` int64 of each layer since the start.

    The first three are of all processes as of the last reduction, and of this process since. The last two are equal on
    all processes, because they come from averaged gradients and reduced statistics.

    Attributes:
        tokens: Tokens behind the running estimate and what has not been reduced yet; never faded.
        rejected: Micro-batches left out because they were not finite.
        capture_counts: Uses of the layer that have sent statistics.
        fallbacks: Gradients of A or B whose preconditioned version was not finite, so that the raw one was used.
        escalations: Rungs of the damping ladder climbed at refreshes.
    """

    SHARED = ("tokens", "rejected", "capture_counts")
    REPLICATED = ("fallbacks", "escalations")

    def __init__(self, layers: int) -> None:
        """Start at zero."""
        self.tokens, self.rejected, self.capture_counts, self.fallbacks, self.escalations = (
            torch.zeros(layers, dtype=torch.int64) for _ in range(5)
        )
        self._reduced_counts = torch.zeros(len(self.SHARED), layers, dtype=torch.int64)

    def unreduced_counts(self) -> Tensor:
        """Return the shared counts `[3, L]` of this process since the last reduction."""
        return torch.stack([getattr(self, name) for name in self.SHARED]) - self._reduced_counts

    def set_reduced_counts(self, of_all: Tensor) -> None:
        """Add what `unreduced_counts` sums to over all processes `[3, L]`."""
        self._reduced_counts = self._reduced_counts + of_all
        for name, counts in zip(self.SHARED, self._reduced_counts.clone(), strict=True):
            setattr(self, name, counts)

    def events(self) -> dict[str, list[int]]:
        """Return `rejected`, `fallbacks` and `escalations` by layer; one transfer each."""
        return {name: getattr(self, name).tolist() for name in ("rejected", "fallbacks", "escalations")}

    def to(self, device: torch.device) -> None:
        """Move to `device`."""
        for name in (*self.SHARED, *self.REPLICATED, "_reduced_counts"):
            setattr(self, name, getattr(self, name).to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts, as CPU tensors."""
        return {name: getattr(self, name).detach().cpu().clone() for name in (*self.SHARED, *self.REPLICATED)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned, as counts that all processes share."""
        for name, counts in state.items():
            setattr(self, name, counts.to(self.tokens.device).clone())
        self._reduced_counts = torch.stack([getattr(self, name) for name in self.SHARED])
