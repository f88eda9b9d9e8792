"""When the callbacks of the geometry act.

Proven here: at every interval between start and stop, once per accumulation window; the shipped callbacks take the whole
schedule; a schedule that cannot be is refused by the name of its setting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest

from grit_lightning.callbacks import GeometryCallback, RankAdaptation, Reprojection
from grit_lightning.geometry.rank_space import RankSpaceGeometry


class Remembering(GeometryCallback):
    """Acts by noting the step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[int] = []

    def act(self, trainer: pl.Trainer, geometry: RankSpaceGeometry) -> None:
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({"every_n_steps": 1}, [1, 2, 3, 4, 5, 6]),
        ({"every_n_steps": 2}, [2, 4, 6]),
        ({"every_n_steps": 2, "start_step": 3}, [4, 6]),
        ({"every_n_steps": 2, "start_step": 4, "stop_step": 5}, [4]),
        ({"every_n_steps": 1, "stop_step": 2}, [1, 2]),
    ],
)
def test_actions_fall_on_the_interval_between_start_and_stop_once_per_window(
    schedule: dict[str, int],
    steps: list[int],
    make_module: Callable[..., Any],
    make_trainer: Callable[..., pl.Trainer],
    loader: Callable[..., Any],
) -> None:
    callback = Remembering(**schedule)
    make_trainer(callbacks=[callback], accumulate_grad_batches=2).fit(make_module(), loader(12), loader(1))
    assert callback.steps == steps


@pytest.mark.parametrize("kind", [Reprojection, RankAdaptation])
def test_the_shipped_callbacks_take_the_whole_schedule(kind: type[Reprojection] | type[RankAdaptation]) -> None:
    callback = kind(every_n_steps=10, start_step=20, stop_step=40)
    assert [step for step in range(1, 60) if callback.should_act(step)] == [20, 30, 40]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"every_n_steps": 0}, r"Remembering.every_n_steps: expected an integer ≥ 1 \(optimizer steps\), got 0"),
        ({"every_n_steps": 1, "start_step": -1}, r"Remembering.start_step: expected an integer ≥ 0 .* got -1"),
        (
            {"every_n_steps": 1, "start_step": 9, "stop_step": 8},
            "stop_step: expected .* ≥ start_step 9, got 8",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(schedule: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Remembering(**schedule)
