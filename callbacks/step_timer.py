"""How long a training step takes, and on what."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import Optimizer

from grit_lightning.errors import require
from grit_lightning.geometry.stopwatch import Stopwatch

PHASES = ("forward", "backward", "optimizer")
_MARKS_BEFORE_RESOLVING = 256  # steps; bounds what is kept when nothing is logged


class StepTimer(Callback):
    """Times every optimizer step, split into forward, backward, optimizer and what the geometry adds.

    A step is the work from the start of its first micro-batch to the end of its optimizer step, plus the work of the
    geometry that callbacks ask for after it (reprojection). An accumulation window is one step. Waiting for data,
    validation, checkpoints and the other callbacks' work are no part of it, wherever this callback stands in the list.

    The split adds up to the step: `forward` is `training_step`; `backward` is back-propagation with the gradient
    reduction between processes; `optimizer` is zeroing, clipping and the update; `capture`, `precondition` and
    `reprojection` are the geometry's sections, taken out of the phase that they run in. Any section that is not one
    of the three phases counts as the geometry's. On CUDA the device's own clock is read, without waiting for it.

    With a logger, the means since the last log are written as `time/step`, `time/<section>` (seconds a step) and
    `time/geometry_share` (0 to 1).
    """

    def __init__(self, every_n_steps: int | None = 50, skip_steps: int = 5) -> None:
        """Check and store the settings.

        Args:
            every_n_steps: Optimizer steps between logs; None logs nothing.
            skip_steps: First optimizer steps of a fit that the statistics leave out: they allocate and warm up.

        Raises:
            ValueError: A setting is out of range.
        """
        fits = every_n_steps is None or every_n_steps >= 1
        require("StepTimer", "every_n_steps", fits, "an integer ≥ 1 (optimizer steps) or null", every_n_steps)
        require("StepTimer", "skip_steps", skip_steps >= 0, "an integer ≥ 0 (optimizer steps)", skip_steps)
        self.every_n_steps = every_n_steps
        self.skip_steps = skip_steps
        self._stopwatch = Stopwatch("cpu")
        self._open: Any = None
        self._hooks: list[Any] = []
        self._global_step = 0  # when the last step ended
        self._in_window = False  # between the first micro-batch's start and the step's end
        self._marks: list[dict[str, float]] = []  # what the stopwatch showed when each step started
        self._seconds: list[float] = []  # of every finished step
        self._split: dict[str, float] = {}  # seconds by section over the steps that count
        self._logged: tuple[int, dict[str, float]] = (0, {})  # step and stopwatch at the last log

    def summary(self) -> dict[str, Any]:
        """Return the statistics of the steps so far; waits for the device.

        Returns:
            `steps`, counted; `measured_steps`, those behind the statistics; `mean`, `p95`, `p99`, seconds;
            `geometry_share`, 0 to 1, of the time of all measured steps; `split`, mean seconds a step by section.
            Statistics of no steps are None, and their split is empty.
        """
        self._collect()
        finished, split = list(self._seconds), self._split
        if self._marks and not self._in_window:  # the last step has ended, but no next one has started
            step = _difference(self._marks[-1], self._stopwatch.read())
            finished.append(sum(step.values()))
            if len(finished) > self.skip_steps:
                split = _sum(split, step)
        measured = torch.tensor(finished[self.skip_steps :], dtype=torch.float64)
        n = len(measured)
        return {
            "steps": len(finished),
            "measured_steps": n,
            "mean": float(measured.mean()) if n else None,
            "p95": float(measured.quantile(0.95)) if n else None,
            "p99": float(measured.quantile(0.99)) if n else None,
            "geometry_share": _geometry_share(split) if n else None,
            "split": {section: split[section] / n for section in sorted(split, key=_place)},
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Join the geometry's stopwatch, so that its sections are taken out of the phases around them."""
        geometry = getattr(pl_module, "geometry", None)
        self._stopwatch = Stopwatch() if geometry is None else geometry.stopwatch
        self._stopwatch.device = pl_module.device
        self._stopwatch.enabled = True
        self._global_step, self._in_window = trainer.global_step, False
        self._marks, self._seconds, self._split = [], [], {}
        self._logged = (self._global_step, self._stopwatch.read())
        # The only moment after the update and before every other callback's on_train_batch_end.
        self._hooks = [
            optimizer.register_step_post_hook(lambda *_: self._switch(None))
            for optimizer in trainer.optimizers
            if isinstance(optimizer, Optimizer) and pl_module.automatic_optimization
        ]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the forward pass; the step too, if this is its first micro-batch."""
        if not self._in_window:
            self._marks.append(self._stopwatch.snapshot())
            self._in_window = True
            if len(self._marks) >= _MARKS_BEFORE_RESOLVING:
                self._collect()
        self._switch("forward")

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """End the forward pass; zeroing is the optimizer's work."""
        self._switch("optimizer")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Start the backward pass."""
        self._switch("backward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the backward pass; what follows in this micro-batch belongs to the update."""
        self._switch("optimizer")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the micro-batch, and the step with it if the optimizer has moved."""
        self._switch(None)
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        self._in_window = False
        if self.every_n_steps is not None and self._global_step % self.every_n_steps == 0:
            self._log(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop measuring."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop measuring; the step that failed is not counted."""
        self._stop()

    def _switch(self, phase: str | None) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = None if phase is None or not self._in_window else self._stopwatch(phase).__enter__()

    def _stop(self) -> None:
        self._switch(None)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._marks and not self._in_window:
            self._marks.append(self._stopwatch.snapshot())
        self._collect()
        self._marks = []

    def _collect(self) -> None:
        """Turn the marks between finished steps into their seconds."""
        self._stopwatch.read()  # fills the marks
        for before, after in pairwise(self._marks):
            step = _difference(before, after)
            self._seconds.append(sum(step.values()))
            if len(self._seconds) > self.skip_steps:
                self._split = _sum(self._split, step)
        self._marks = self._marks[-1:]

    def _log(self, trainer: pl.Trainer) -> None:
        if not trainer.loggers:
            return
        (logged_step, before), now = self._logged, self._stopwatch.read()
        self._logged = (self._global_step, now)
        split, steps = _difference(before, now), self._global_step - logged_step
        metrics: dict[str, float] = {"epoch": trainer.current_epoch}
        metrics |= {f"time/{section}": total / steps for section, total in split.items()}
        metrics["time/step"] = sum(split.values()) / steps
        metrics["time/geometry_share"] = _geometry_share(split)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._global_step - 1)  # Lightning's loggers count steps from 0


def _place(section: str) -> int:
    return PHASES.index(section) if section in PHASES else len(PHASES)


def _difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {section: total - before.get(section, 0.0) for section, total in after.items()}


def _sum(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    return {section: first.get(section, 0.0) + second.get(section, 0.0) for section in {**first, **second}}


def _geometry_share(split: dict[str, float]) -> float:
    total = sum(split.values())
    return sum(seconds for section, seconds in split.items() if section not in PHASES) / total if total else 0.0
