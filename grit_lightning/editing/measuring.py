"""What held-out rows say of a model: nats of each row, and the change between two states of it with a paired interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from grit_lightning.backbones.inputs import accepted_arguments
from grit_lightning.batches import learnt_labels, model_inputs
from grit_lightning.editing.rows import Rows, batches_of, predicted_tokens
from grit_lightning.editing.statistics import Progress
from grit_lightning.errors import DivergedError, InvalidValueError
from grit_lightning.forgetting.change import mean_change, mean_of_changes
from grit_lightning.forgetting.likelihood import row_log_likelihoods
from grit_lightning.forgetting.without_trace import evaluating_without_trace

Metric = Callable[[PeftModel], Tensor]
"""Scores a model on the task's held-out rows: a value for each row `[N]`, larger is better."""


@dataclass(frozen=True)
class HeldOut:
    """Rows that statistics are not taken from.

    Attributes:
        name: What its results are called.
        rows: The rows.
        role: `task` and `general` steer the choice, `beside` is only reported.
        weight: Its part in the mean over general sets, > 0; only ratios matter.
    """

    name: str
    rows: Rows
    role: Literal["task", "general", "beside"]
    weight: float = 1.0

    @property
    def tokens(self) -> Tensor:
        """Predicted tokens of each row, float64 `[N]`."""
        return torch.tensor([predicted_tokens(row) for row in self.rows], dtype=torch.float64)


class Measurement(NamedTuple):
    """What one state of the model was measured at."""

    nats: Mapping[str, Tensor]
    """Sum over predicted tokens of each row, float64 `[N]` on the CPU, by the name of the set."""
    metric: Tensor | None
    """The task's metric of each row, float64 `[N]` on the CPU; None without one."""


class Change(NamedTuple):
    """A mean, how far it is from the same mean in another state, and the paired bootstrap interval of that."""

    value: float
    change: float
    interval: tuple[float, float] | None
    """None for a single row."""


class Measurer:
    """Measures a model on held-out sets, and compares states of it.

    Args:
        model: The model.
        sets: What to measure: one of role `task`, and at least one of role `general`.
        batch_size: Rows in a forward pass.
        metric: A metric of the task besides its loss.
        confidence: Level of the intervals, in (0, 1).
        progress: Is told how many rows have been measured.
    """

    def __init__(
        self,
        model: PeftModel,
        sets: Sequence[HeldOut],
        batch_size: int = 8,
        metric: Metric | None = None,
        confidence: float = 0.95,
        progress: Progress | None = None,
    ) -> None:
        """Count the tokens of every set."""
        self.model, self.sets, self.batch_size = model, list(sets), batch_size
        self.metric, self.confidence, self.progress = metric, confidence, progress
        self._tokens = {held_out.name: held_out.tokens for held_out in self.sets}
        self._device = next(parameter.device for parameter in model.parameters())

    def measure(self, name: str) -> Measurement:
        """Measure the model as it is now, without leaving a trace in it.

        Args:
            name: What progress and messages call it.

        Raises:
            FloatingPointError: If a loss is not finite.
            ValueError: If the metric is not a finite number for every row of the task.
        """
        total, done = sum(len(held_out.rows) for held_out in self.sets), 0
        nats: dict[str, Tensor] = {}
        with evaluating_without_trace(self.model, self._device):
            for held_out in self.sets:
                values = torch.zeros(len(held_out.rows), dtype=torch.float64)
                for chosen, row_nats in _row_nats(self.model, held_out.rows, self.batch_size, self._device):
                    values[chosen] = row_nats.double().cpu()
                    done += len(chosen)
                    if self.progress is not None:
                        self.progress(name, done, total)
                _require_finite(values, f"{name}, loss on {held_out.name}")
                nats[held_out.name] = values
            metric = None if self.metric is None else self._metric()
        return Measurement(nats, metric)

    def _metric(self) -> Tensor:
        assert self.metric is not None
        rows = next(len(held_out.rows) for held_out in self.sets if held_out.role == "task")
        values = torch.as_tensor(self.metric(self.model)).double().cpu()
        if values.shape != (rows,) or not bool(values.isfinite().all()):
            raise InvalidValueError(
                f"task_metric: expected a finite number for each of the task's {rows} held-out rows, got {tuple(values.shape)} "
                "or others. Return one tensor with a value for each row."
            )
        return values

    def task(self, before: Measurement, after: Measurement) -> Change:
        """Return the task's loss after, in nats per predicted token, and its change."""
        return self.one(next(held_out for held_out in self.sets if held_out.role == "task"), before, after)

    def one(self, held_out: HeldOut, before: Measurement, after: Measurement) -> Change:
        """Return the loss on one set, and its change."""
        return self._change(before.nats[held_out.name], after.nats[held_out.name], self._tokens[held_out.name])

    def general(self, before: Measurement, after: Measurement) -> Change:
        """Return the weighted mean of the losses on all general sets, and its change."""
        sets = [held_out for held_out in self.sets if held_out.role == "general"]
        shares = [held_out.weight / sum(other.weight for other in sets) for held_out in sets]
        parts = [(before.nats[s.name], after.nats[s.name], self._tokens[s.name]) for s in sets]
        value = sum(
            share * float(end.sum() / tokens.sum()) for share, (_, end, tokens) in zip(shares, parts, strict=True)
        )
        return Change(value, *mean_of_changes(parts, shares, self.confidence))

    def of_metric(self, before: Measurement, after: Measurement) -> Change | None:
        """Return the task's metric, and its change; None without one."""
        if before.metric is None or after.metric is None:
            return None
        return self._change(before.metric, after.metric, torch.ones_like(after.metric))

    def _change(self, before: Tensor, after: Tensor, weights: Tensor) -> Change:
        change, interval = mean_change(before, after, weights, self.confidence)
        return Change(float(after.sum() / weights.sum()), change, interval)


def _require_finite(values: Tensor, what: str) -> None:
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise DivergedError(
            f"{what}: expected finite numbers, got another in row {bad[0]} and {len(bad) - 1} more. The adapter has "
            "diverged, or the row is broken."
        )


def _row_nats(
    model: PeftModel, rows: Rows, batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor]]:
    accepted = accepted_arguments(model)
    for chosen, batch in batches_of(rows, batch_size, device):
        logits = model(**model_inputs(batch, accepted, with_loss=False, trim=True), use_cache=False).logits
        yield chosen, -torch.stack(row_log_likelihoods(logits, learnt_labels(batch)))
