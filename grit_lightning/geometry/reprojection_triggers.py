"""Whether a reprojection is due: what the spectrum of Σ_a says, by the trigger's name.

A trigger is asked at every check and told of every reprojection. It looks at the mean over the layers that have enough
samples and whose k is below r; the others hold their whole spectrum at any time. To add one, write the class, put it into
`TRIGGERS` and describe it in `callbacks.Reprojection`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grit_lightning import functional as F
from grit_lightning.geometry.rank_group import RankGroup
from grit_lightning.geometry.rank_space import RankSpaceGeometry


@dataclass(frozen=True)
class TriggerSettings:
    """What the triggers choose from; see `callbacks.Reprojection`."""

    every_n_steps: int
    """Optimizer steps between checks."""
    k: int | None
    """Cap on the directions that a layer keeps."""
    mass_low: float
    mass_high: float
    max_drift: float
    """Sine of an angle."""
    key: str
    """Where the group keeps this trigger's references."""


class ReprojectionTrigger(ABC):
    """Decides, check by check.

    Args:
        settings: Its thresholds.

    Attributes:
        armed: Whether the next excursion counts; the only state besides what the groups keep.
    """

    def __init__(self, settings: TriggerSettings) -> None:
        """Begin armed."""
        self.settings = settings
        self.armed = True

    @abstractmethod
    def due(self, geometry: RankSpaceGeometry) -> str | None:
        """Return why a reprojection is due now, or None."""

    def reprojected(self, geometry: RankSpaceGeometry) -> None:  # noqa: B027 (most need not know)
        """Take note that the layers have just been reprojected."""

    def _measured(self, geometry: RankSpaceGeometry) -> Iterator[tuple[RankGroup, Tensor, Tensor]]:
        """Yield groups with the ranks `[L]` their layers are cut to, and which layers `[L]` bool count."""
        cap = self.settings.k
        for group in geometry.groups:
            k = group.ranks if cap is None else group.ranks.clamp(max=cap)
            yield group, k, geometry.has_enough_samples(group).cpu() & (k < group.r)


class PeriodTrigger(ReprojectionTrigger):
    """Due at every check."""

    def due(self, geometry: RankSpaceGeometry) -> str | None:
        """Return the period."""
        return f"every {self.settings.every_n_steps} steps"


class MassRatioTrigger(ReprojectionTrigger):
    """Due when Σ_{i≤k} λ_i / Σ λ_i has left its band, and not again before it was back inside (paper: adaptive cadence)."""

    def due(self, geometry: RankSpaceGeometry) -> str | None:
        """Return the ratio and its band, once per excursion."""
        ratio = _mean(
            [
                F.mass_ratio(F.eigenbasis(group.a_cov.cpu())[0], k)[counts]
                for group, k, counts in self._measured(geometry)
            ]
        )
        if ratio is None:
            return None
        low, high = self.settings.mass_low, self.settings.mass_high
        inside = low <= ratio <= high
        fires, self.armed = self.armed and not inside, inside
        return f"mass ratio {ratio:.3f} outside [{low:g}, {high:g}]" if fires else None


class AngleDriftTrigger(ReprojectionTrigger):
    """Due when the top k eigenvectors have turned too far since the last event or the first check (beyond the paper)."""

    def due(self, geometry: RankSpaceGeometry) -> str | None:
        """Return the mean drift since the references, which layers that have none yet get now."""
        key, drifts = self.settings.key, []
        for group, k, counts in self._measured(geometry):
            reference = group.reference(key)
            known = reference.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
            group.keep_reference(key, ~known & geometry.has_enough_samples(group))
            then, now = F.eigenbasis(reference.cpu())[1], F.eigenbasis(group.a_cov.cpu())[1]
            drifts.append(F.principal_angle_drift(then, now, k)[counts & known.cpu()])
        drift, allowed = _mean(drifts), self.settings.max_drift
        return f"angle drift {drift:.3f} > max_drift {allowed:g}" if drift is not None and drift > allowed else None

    def reprojected(self, geometry: RankSpaceGeometry) -> None:
        """Measure from here on."""
        for group in geometry.groups:
            group.keep_reference(self.settings.key)


TRIGGERS: dict[str, type[ReprojectionTrigger]] = {
    "period": PeriodTrigger,
    "mass_ratio": MassRatioTrigger,
    "angle_drift": AngleDriftTrigger,
}
"""Triggers by the name that `callbacks.Reprojection` takes."""


def _mean(parts: list[Tensor]) -> float | None:
    values = torch.cat(parts)
    return float(values.mean()) if len(values) else None
