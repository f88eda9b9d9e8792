"""StepTimer: what counts to a step and to which part, on a clock that moves only where the test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback

from grit_lightning.callbacks import StepTimer
from grit_lightning.geometry import stopwatch as timing
from grit_lightning.geometry.stopwatch import Stopwatch
from grit_lightning.runs.metrics_log import JSONLinesLogger

Fit = Callable[..., pl.LightningModule]


class Clock:
    """Host seconds that move only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def spend(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


class Timed(pl.LightningModule):
    """Spends a different power of two in every part of a step, so that each sum says what it is made of."""

    def __init__(self, spend: Clock, stopwatch: Stopwatch | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.spend = spend
        self.geometry = None if stopwatch is None else SimpleNamespace(stopwatch=stopwatch)

    def section(self, name: str, seconds: float) -> None:
        if self.geometry is not None:
            with self.geometry.stopwatch(name):
                self.spend(seconds)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.spend(1)
        loss = (self.weight * batch).sum()

        def during_backward(gradient: torch.Tensor) -> None:
            self.spend(2)
            self.section("capture", 4)

        loss.register_hook(during_backward)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.spend(10_000)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.section("precondition", 8)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)
        self.spend(64)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.register_step_post_hook(lambda *_: self.spend(16))
        return optimizer


class Reprojecting(Callback):
    """Works on the geometry after every optimizer step."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step * trainer.accumulate_grad_batches == trainer.fit_loop.total_batch_idx + 1:
            pl_module.section("reprojection", 32)


class Unrelated(Callback):
    """Spends time in every hook that is not part of a step."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.spend(1_000)


class SlowBatches:
    """Data that take longer than the step."""

    def __init__(self, spend: Clock, batches: int) -> None:
        self.spend = spend
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(self.batches):
            self.spend(100)
            yield torch.ones(1)


@pytest.fixture
def fit(spend: Clock, make_trainer: Callable[..., pl.Trainer]) -> Fit:
    def run(callbacks: list[Callback], *, batches: int = 6, geometry: bool = True, **settings: Any) -> Timed:
        module = Timed(spend, Stopwatch() if geometry else None)
        trainer = make_trainer(callbacks=callbacks, **settings)
        trainer.fit(module, SlowBatches(spend, batches), [torch.ones(1)])
        return module

    return run


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_split_adds_up_to_the_step_wherever_the_timer_stands(fit: Fit, order: tuple[int, ...]) -> None:
    timer = StepTimer(skip_steps=0)
    callbacks = [timer, Reprojecting(), Unrelated()]
    fit([callbacks[place] for place in order], val_check_interval=2)
    summary = timer.summary()
    assert summary["split"] == {
        "forward": 1,
        "backward": 2,
        "optimizer": 16 + 64,
        "capture": 4,
        "precondition": 8,
        "reprojection": 32,
    }
    assert summary["mean"] == summary["p95"] == summary["p99"] == 127
    assert summary["geometry_share"] == 44 / 127
    assert summary["steps"] == summary["measured_steps"] == 6


def test_accumulation_window_is_one_step_without_waiting_or_validation(fit: Fit) -> None:
    timer = StepTimer(skip_steps=0)
    fit([timer, Reprojecting()], batches=12, accumulate_grad_batches=3, val_check_interval=2)
    summary = timer.summary()
    assert summary["steps"] == 4
    assert summary["mean"] == 3 * (1 + 2 + 4) + 8 + 16 + 64 + 32
    assert summary["split"]["capture"] == 12


def test_without_geometry_the_share_is_zero(fit: Fit) -> None:
    timer = StepTimer(skip_steps=0)
    fit([timer, Reprojecting()], geometry=False)
    summary = timer.summary()
    assert summary["split"] == {"forward": 1, "backward": 2, "optimizer": 16 + 64}
    assert summary["geometry_share"] == 0.0


def test_warm_up_steps_are_counted_but_not_measured(fit: Fit, spend: Clock) -> None:
    class WarmUp(Callback):
        def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step < 2:
                spend(500)

    timer = StepTimer(skip_steps=2)
    fit([timer, WarmUp()], geometry=False)
    summary = timer.summary()
    assert (summary["steps"], summary["measured_steps"]) == (6, 4)
    assert summary["mean"] == summary["p99"] == sum(summary["split"].values()) == 83


def test_stopwatch_that_was_switched_off_is_switched_on(spend: Clock, make_trainer: Callable[..., pl.Trainer]) -> None:
    module, timer = Timed(spend, Stopwatch(enabled=False)), StepTimer(skip_steps=0)
    make_trainer(callbacks=[timer]).fit(module, SlowBatches(spend, 2), [torch.ones(1)])
    assert timer.summary()["mean"] == 95


def test_percentiles_are_those_of_the_steps(fit: Fit, spend: Clock) -> None:
    class Slower(Callback):
        def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
            spend(trainer.global_step)  # 0, 1, …, 100

    timer = StepTimer(skip_steps=0)
    fit([timer, Slower()], batches=101, geometry=False)
    summary = timer.summary()
    assert summary["mean"] == 83 + 50
    assert summary["p95"] == pytest.approx(83 + 95)
    assert summary["p99"] == pytest.approx(83 + 99)


def test_long_runs_keep_one_number_a_step(fit: Fit) -> None:
    timer = StepTimer(every_n_steps=None, skip_steps=0)
    fit([timer], batches=600, geometry=False)
    assert timer.summary()["steps"] == 600
    assert timer.summary()["mean"] == 83
    assert len(timer._marks) == 0


def test_no_step_gives_no_statistics(fit: Fit) -> None:
    nothing = {"measured_steps": 0, "mean": None, "p95": None, "p99": None, "geometry_share": None, "split": {}}
    timer = StepTimer(skip_steps=50)
    assert timer.summary() == {"steps": 0} | nothing
    fit([timer])
    assert timer.summary() == {"steps": 6} | nothing


def test_failed_step_is_not_counted(fit: Fit) -> None:
    class Fails(Callback):
        def on_after_backward(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("on purpose")

    timer = StepTimer(skip_steps=0)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit([Fails(), timer], geometry=False)
    assert timer.summary()["steps"] == 3
    assert timer.summary()["mean"] == 83


def test_second_fit_starts_over(spend: Clock, make_trainer: Callable[..., pl.Trainer]) -> None:
    module, timer = Timed(spend, Stopwatch()), StepTimer(skip_steps=0)
    for batches in (5, 3):
        make_trainer(callbacks=[timer]).fit(module, SlowBatches(spend, batches), [torch.ones(1)])
        assert timer.summary()["steps"] == batches
        assert timer.summary()["mean"] == 95


def test_logs_means_since_the_last_log_with_the_loggers_step(
    fit: Fit, tmp_path: Any, read_metrics: Callable[..., list[dict[str, Any]]]
) -> None:
    fit([Reprojecting(), StepTimer(every_n_steps=2)], logger=JSONLinesLogger(tmp_path))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 3, 5]
    for line in lines:
        assert line["time/step"] == 127
        assert line["time/reprojection"] == 32
        assert line["time/geometry_share"] == 44 / 127


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"barebones": True}], ids=str)
def test_reduced_trainers(spend: Clock, settings: dict[str, Any]) -> None:
    module, timer = Timed(spend, Stopwatch()), StepTimer(every_n_steps=1, skip_steps=0)
    quiet = {} if "barebones" in settings else {"enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(callbacks=[timer], accelerator="cpu", max_epochs=1, **settings, **quiet).fit(
        module, SlowBatches(spend, 2), [torch.ones(1)]
    )
    assert timer.summary()["mean"] == 95


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"skip_steps": -1}], ids=str)
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StepTimer(**wrong)


def test_real_module_has_every_section(
    make_module: Callable[..., Any], loader: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    from grit_lightning.callbacks.reprojection import Reprojection

    timer = StepTimer(skip_steps=2)
    make_trainer(callbacks=[timer, Reprojection(every_n_steps=3)]).fit(make_module(), loader(8), loader(1))
    summary = timer.summary()
    assert set(summary["split"]) == {"forward", "backward", "optimizer", "capture", "precondition", "reprojection"}
    assert all(seconds > 0 for seconds in summary["split"].values())
    assert summary["mean"] == pytest.approx(sum(summary["split"].values()))
