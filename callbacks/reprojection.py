"""Reprojection of the adapter onto its dominant curvature directions, periodic or when the spectrum asks for it."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from grit_lightning import functional as F
from grit_lightning.callbacks.base import GeometryCallback, ScheduledCallback, one_of
from grit_lightning.callbacks.event_log import EventLog
from grit_lightning.callbacks.rank_adaptation import RankAdaptation
from grit_lightning.errors import InvalidValueError, require
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.geometry.reprojection_triggers import TRIGGERS, TriggerSettings
from grit_lightning.ignored_settings import warn_if_ignored


class ReprojectionEvent(NamedTuple):
    """One reprojection."""

    step: int
    """Optimizer steps taken."""
    reason: str


class Reprojection(GeometryCallback):
    """Reprojects every layer onto k curvature directions, after the optimizer step (paper §2.3).

    With an adaptive trigger, `every_n_steps` is the interval between checks. A check looks at the mean over the layers that
    have enough samples and whose k is below r; the others hold their whole spectrum at any time. Both triggers look at Σ_a
    in every mode, because Σ_g and σ of dropped directions are zero.

    Whether a dropped direction can return: with `keep_dropped` its row of A stays, so that Σ_a measures it and B's gradient
    sees it, and it does as soon as `RankAdaptation` raises the rank. With `keep_dropped: false` it cannot: its row of A and
    its column of B are both zero, and each one's gradient is proportional to the other. The paper says that it can.

    Args:
        mode: `one_sided` projects A and B with the eigenvectors of Σ_a (paper), `two_sided` B with those of Σ_g (paper's
            Q-GRIT), `balanced` drops the directions that cost the least predicted loss (beyond the paper).
        every_n_steps: Optimizer steps between reprojections (paper: reprojection_freq), or between checks.
        start_step: First optimizer step at which one may happen (paper: reprojection_warmup_steps).
        k: Directions to keep (paper: reprojection_k), a cap on every layer's effective rank; None keeps as many as the
            effective rank says, which `RankAdaptation` sets. Not both: a full projection beside it takes no k.
        blend: γ in (0, 1]; 1 projects fully. A smaller γ damps the other directions by 1 − γ and keeps the rank.
        keep_dropped: Keep the rows of A beyond k, which the zeroed columns of B make inert: ΔW is the same, but dropped
            directions stay measured, so that ranks can rise again and the energy of the next decision is that of the whole
            spectrum. False zeroes them, as the paper's A ← P_A A does to the letter. `balanced` always keeps them.
        trigger: `period` acts at every interval. `mass_ratio` (paper: adaptive cadence) acts when Σ_{i≤k} λ_i / Σ λ_i is
            found outside [mass_low, mass_high], and not again until it has been inside. `angle_drift` (beyond the paper)
            acts when the space of the top k eigenvectors has turned, since the last event or the first check, by an
            angle whose sine exceeds `max_drift`.
        mass_low: Lower end of the band, for `mass_ratio`.
        mass_high: Upper end of the band.
        max_drift: Sine of the largest principal angle, in [0, 1), for `angle_drift`.
        preserve_volume: Give the balancing transform determinant ±1. It then keeps the mean scale of A and B, which
            `balanced` would otherwise set to the fourth root of Σ_g over Σ_a: a step of Adam has a fixed length.
        stop_step: Last optimizer step at which one may happen; None for no end.

    Attributes:
        events: The last 10,000 reprojections with step and reason; all are in `reprojections.jsonl` in the run's folder, if
            the run has loggers.

    Raises:
        ValueError: If an argument is out of range.
    """

    changes_coordinates = True

    def __init__(
        self,
        mode: str = "one_sided",
        every_n_steps: int = 50,
        start_step: int = 0,
        k: int | None = None,
        blend: float = 1.0,
        keep_dropped: bool = True,
        trigger: str = "period",
        mass_low: float = 0.8,
        mass_high: float = 0.95,
        max_drift: float = 0.5,
        preserve_volume: bool = True,
        stop_step: int | None = None,
    ) -> None:
        """Check and remember the settings."""
        super().__init__(every_n_steps, start_step, stop_step, EventLog("reprojections.jsonl"))
        modes = [member.value for member in F.ReprojectionMode]
        require("Reprojection", "mode", mode in modes, one_of(modes), mode)
        require("Reprojection", "k", k is None or k >= 1, "an integer ≥ 1 or null", k)
        require("Reprojection", "blend", 0.0 < blend <= 1.0, "a number in (0, 1]", blend)
        require("Reprojection", "trigger", trigger in TRIGGERS, one_of(TRIGGERS), trigger)
        band = (mass_low, mass_high)
        require(
            "Reprojection", "mass_low and mass_high", 0.0 <= mass_low < mass_high <= 1.0, "0 ≤ low < high ≤ 1", band
        )
        require("Reprojection", "max_drift (sine of an angle)", 0.0 <= max_drift < 1.0, "a number in [0, 1)", max_drift)
        self.mode = F.ReprojectionMode(mode)
        self.k = k
        self.blend = blend
        self.trigger = trigger
        self.events: deque[ReprojectionEvent] = deque(maxlen=10_000)
        self.event_count = 0
        self._ignored_if_given = {
            "mass_low": mass_low,
            "mass_high": mass_high,
            "max_drift": max_drift,
            "keep_dropped": keep_dropped,
            "preserve_volume": preserve_volume,
        }
        self._maps = F.maps_rule(self.mode, blend, keep_dropped, preserve_volume)
        limits = TriggerSettings(every_n_steps, k, mass_low, mass_high, max_drift, self.state_key)
        self._trigger = TRIGGERS[trigger](limits)

    @property
    def events_per_1000_steps(self) -> float:
        """Reprojections per 1,000 optimizer steps since the start of training."""
        return 1000.0 * self.event_count / max(self._last_step, 1)

    # Trainer hooks.

    def validate(self, geometry: RankSpaceGeometry) -> None:
        """Refuse a k that no layer can have, and say which settings nothing reads.

        Raises:
            ValueError: If k exceeds the largest LoRA rank.
        """
        largest = max(group.r for group in geometry.groups)
        if self.k is not None and self.k > largest:
            raise InvalidValueError(
                f"Reprojection.k (reprojection_k): expected at most the adapter's rank {largest}, got {self.k}. Lower it, or "
                "raise adapter.r."
            )
        readers = {
            "mass_low": "trigger: mass_ratio",
            "mass_high": "trigger: mass_ratio",
            "max_drift": "trigger: angle_drift",
            "keep_dropped": "mode: one_sided or two_sided",
            "preserve_volume": "mode: balanced",
        }
        balanced = self.mode is F.ReprojectionMode.BALANCED
        acting = {"mass_ratio": {"mass_low", "mass_high"}, "angle_drift": {"max_drift"}}.get(self.trigger, set())
        acting |= {"preserve_volume" if balanced else "keep_dropped"}
        unread = {name: reader for name, reader in readers.items() if name not in acting}
        warn_if_ignored(Reprojection, self._ignored_if_given, unread)

    def validate_beside(self, others: list[ScheduledCallback]) -> None:
        """Refuse to cut ranks to k while `RankAdaptation` sets them: it would raise them again, in the same step.

        Raises:
            ValueError: If both would.
        """
        adapts = any(isinstance(other, RankAdaptation) and self.overlaps(other) for other in others)
        if adapts and self.k is not None and self.blend == 1.0:
            raise InvalidValueError(
                f"Reprojection.k (reprojection_k): expected null beside RankAdaptation, which sets the ranks, got {self.k}. "
                f"Remove it, and set RankAdaptation.max_rank to {self.k} for a cap."
            )

    def act(self, trainer: pl.Trainer, geometry: RankSpaceGeometry) -> None:
        """Reproject every layer that has enough samples, if the trigger says so, and report the rate."""
        geometry.reduce()
        reason = self.due(geometry)
        if reason is not None:
            optimizer = trainer.optimizers[0] if trainer.optimizers else None
            self.reproject(geometry, optimizer)
            event = ReprojectionEvent(trainer.global_step, reason)
            self.events.append(event)
            self.event_count += 1
            self._log_events([event._asdict()])
        if not trainer.barebones:
            rate = {"grit/reprojections_per_1000_steps": self.events_per_1000_steps}
            trainer.lightning_module.log_dict(rate, on_step=True, on_epoch=False, batch_size=1)

    # The event.

    @torch.no_grad()
    def due(self, geometry: RankSpaceGeometry) -> str | None:
        """Return why a reprojection is due now, or None; moves the trigger's state on."""
        if not any(bool(geometry.has_enough_samples(group).any()) for group in geometry.groups):
            return None
        return self._trigger.due(geometry)

    def reproject(self, geometry: RankSpaceGeometry, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Reproject now."""
        ranks = {name: rank if self.k is None else min(rank, self.k) for name, rank in geometry.ranks.items()}
        geometry.reproject(self._maps, ranks, blend=self.blend, optimizer=optimizer)
        self._trigger.reprojected(geometry)

    # Persistence.

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks apart in a checkpoint."""
        return self._generate_state_key(mode=self.mode.value, trigger=self.trigger, start_step=self.start_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the trigger's state; the references of `angle_drift` travel with the geometry."""
        return {"event_count": self.event_count, "armed": self._trigger.armed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.event_count, self._trigger.armed = state_dict["event_count"], state_dict["armed"]
