"""What is derived from the statistics now and then: inverses, eigenbases, readiness; made anew as a whole at a refresh."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Derived:
    """Quantities of L layers of rank r as of one refresh; never changed, only replaced.

    Attributes:
        a_inverse: `[L, r, r]`, (Σ_a + λI)⁻¹.
        g_inverse: `[L, r, r]`, (Σ_g + λI)⁻¹.
        a_basis: `[L, r, r]`, eigenvectors of Σ_a, if the optimizer wants them; else the identity.
        g_basis: `[L, r, r]`, eigenvectors of Σ_g, likewise.
        ready: `[L]` bool, layers whose inverses and bases may be applied.
        any_ready: Whether there is one; known on the host, so that a step needs no synchronisation.
        penalty: `[L, r, r]`, the quadratic forms of the regularisers; None while they are off.
        version: Number of refreshes before and including this one.
    """

    a_inverse: Tensor
    g_inverse: Tensor
    a_basis: Tensor
    g_basis: Tensor
    ready: Tensor
    any_ready: bool = False
    penalty: Tensor | None = None
    version: int = 0

    @classmethod
    def before_any_refresh(cls, layers: int, r: int) -> Derived:
        """Return what leaves every gradient as it is."""
        identity = torch.eye(r, dtype=torch.float32).repeat(layers, 1, 1)
        return cls(identity, identity, identity, identity, torch.zeros(layers, dtype=torch.bool))

    def to(self, device: torch.device) -> Derived:
        """Return a copy on `device`."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self._tensors().items()}
        return replace(self, **moved)

    def state_dict(self) -> dict[str, Any]:
        """Return all fields, as CPU tensors and plain values."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {name: value.detach().cpu().clone() for name, value in self._tensors().items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> Derived:
        """Return what `state_dict` described, on `device`."""
        return cls(**state).to(device)

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
