"""What callbacks with a schedule share: they act once per due optimizer step; most of them on the geometry."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from grit_lightning.callbacks.event_log import EventLog
from grit_lightning.errors import require
from grit_lightning.geometry.optimizer_state import require_followable
from grit_lightning.geometry.rank_space import RankSpaceGeometry


class ScheduledCallback(Callback):
    """Calls `on_due_step` after every optimizer step for which `should_act` is true, once per accumulation window.

    Args:
        every_n_steps: Optimizer steps between two actions; None for no action.
        start_step: First optimizer step (counted from 1) at which an action may happen.
        stop_step: Last optimizer step at which one may, so that the steps after it train what has been decided; None for
            no end.
        events: File of decisions in the run's folder, if the callback takes any.

    Raises:
        ValueError: If an interval is out of range.
    """

    def __init__(
        self,
        every_n_steps: int | None,
        start_step: int = 0,
        stop_step: int | None = None,
        events: EventLog | None = None,
    ) -> None:
        """Check and remember the schedule."""
        super().__init__()
        owner, acts = type(self).__name__, every_n_steps is None or every_n_steps >= 1
        require(owner, "every_n_steps", acts, "an integer ≥ 1 (optimizer steps)", every_n_steps)
        require(owner, "start_step", start_step >= 0, "an integer ≥ 0 (optimizer steps)", start_step)
        ends_after_start = stop_step is None or stop_step >= start_step
        require(owner, "stop_step", ends_after_start, f"null or an integer ≥ start_step {start_step}", stop_step)
        self.every_n_steps = every_n_steps
        self.start_step = start_step
        self.stop_step = stop_step
        self._events = events
        self._last_step = 0

    def should_act(self, step: int) -> bool:
        """Say whether to act after optimizer step `step`; override for another schedule."""
        within = self.start_step <= step <= (step if self.stop_step is None else self.stop_step)
        return self.every_n_steps is not None and within and step % self.every_n_steps == 0

    def overlaps(self, other: ScheduledCallback) -> bool:
        """Say whether another schedule has begun before this one ends, and the other way round."""
        ends = [math.inf if callback.stop_step is None else callback.stop_step for callback in (self, other)]
        both_act = self.every_n_steps is not None and other.every_n_steps is not None
        return both_act and self.start_step <= ends[1] and other.start_step <= ends[0]

    @abstractmethod
    def on_due_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do what the callback is for; runs on every process, after the optimizer step."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle where decisions are written."""
        if self._events is not None:
            self._events.open(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On resume, do not repeat the action of that step, and leave each decision in the file once."""
        self._last_step = trainer.global_step
        if self._events is not None:
            self._events.resume(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Act if this micro-batch has closed a due optimizer step."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if self.should_act(step):
            self.on_due_step(trainer, pl_module)

    def _log_events(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Append decisions to the file."""
        if self._events is not None:
            self._events.write(events)


def one_of(names: Iterable[str]) -> str:
    """List the values that a setting may have: `a, b or c`."""
    *rest, last = names
    return f"{', '.join(rest)} or {last}" if rest else last


class GeometryCallback(ScheduledCallback):
    """A scheduled callback that calls `act` with the geometry.

    Args:
        every_n_steps: Optimizer steps between two actions.
        start_step: First optimizer step (counted from 1) at which an action may happen.
        stop_step: Last optimizer step at which one may, so that the steps after it train what has been decided; None for
            no end.
        events: File of decisions in the run's folder, if the callback takes any.

    Attributes:
        changes_coordinates: Whether it puts the factors A and B into other coordinates.
    """

    changes_coordinates: bool = False
    """Whether the optimizer's state has to follow what it does to the factors."""

    @abstractmethod
    def act(self, trainer: pl.Trainer, geometry: RankSpaceGeometry) -> None:
        """Do what the callback is for; runs on every process, after the optimizer step."""

    def validate(self, geometry: RankSpaceGeometry) -> None:
        """Check settings that depend on the model; raise ValueError."""

    def validate_beside(self, others: list[ScheduledCallback]) -> None:
        """Check settings that depend on the other callbacks with a schedule; raise ValueError."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resolve the geometry, which exists from here on.

        Raises:
            MisconfigurationException: If the module has no geometry, or the weights are averaged while this callback
                changes their coordinates.
            ValueError: If the optimizer's state cannot follow what the callback does.
        """
        if self.changes_coordinates:
            self._require_no_average(trainer)
        self.validate(self._geometry(pl_module))
        if self.changes_coordinates:
            for optimizer in trainer.optimizers:
                require_followable(optimizer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set outside the Trainer's __init__
        self.validate_beside(
            [other for other in callbacks if isinstance(other, ScheduledCallback) and other is not self]
        )

    def on_due_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act on the geometry."""
        self.act(trainer, self._geometry(pl_module))

    def _require_no_average(self, trainer: pl.Trainer) -> None:
        """Refuse an average over factors in different coordinates, whose product is no model's ΔW."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside the Trainer's __init__
        for other in callbacks:
            if isinstance(other, WeightAveraging | StochasticWeightAveraging):
                raise MisconfigurationException(
                    f"trainer.callbacks: expected no average of the weights beside {type(self).__name__}, which changes the "
                    f"coordinates of A and B between two steps, got {type(other).__name__}. Leave one of the two out."
                )

    def _geometry(self, pl_module: pl.LightningModule) -> RankSpaceGeometry:
        geometry = getattr(pl_module, "geometry", None)
        if not isinstance(geometry, RankSpaceGeometry):
            raise MisconfigurationException(
                f"{type(self).__name__}: expected a module with a rank-space geometry, got {type(pl_module).__name__} with "
                f"geometry {geometry!r}. Set model.geometry to a GeometryConfig, or in a module of your own the attribute "
                "`geometry` to that of its GeometryHooks; or remove the callback."
            )
        return geometry
