"""What a Trainer can do besides training, one feature a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.core.datamodule import LightningDataModule
from lightning.pytorch.tuner import Tuner
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

from grit_lightning import GritLitModule

from .cases import STEPS, TOKENS, Batch, Case, batches, loader, lora
from .conftest import Compare
from .watching import Run, require

ENDLESS = {"max_steps": -1}
SOON = timedelta(seconds=0.2)


# What must have happened.


def schedule_ends_with_the_run(run: Run) -> None:
    """Check that a cosine schedule falls all through the run, and reaches zero at its end."""
    falls = all(one > two for one, two in pairwise([*run.rates, run.last_rate]))
    rates = [round(rate, 6) for rate in run.rates]
    require(falls and run.last_rate < 1e-9, f"the cosine schedule goes {rates}, then {run.last_rate:.6f}")


def weights_are_averaged(run: Run) -> None:
    now = run.trained()
    require(any(not torch.equal(run.end[name], now[name]) for name in now), "the weights are those of the last step")


def rate_was_reduced(run: Run) -> None:
    require(run.rates[-1] < run.rates[0], f"the learning rates are {run.rates}")


def only_the_fit_was_heard(run: Run) -> None:
    """Check that what ran before the fit has left no trace in the statistics."""
    if run.module.geometry is not None:
        heard = {view.n_samples for view in run.module.geometry.layers.values()}
        require(heard == {run.tokens}, f"statistics of {heard} tokens, of {run.tokens} in the fit")


# Data and ways to fit.


class _Stream(IterableDataset[Batch]):
    def __iter__(self) -> Iterator[Batch]:
        return iter(batches())


class _Data(LightningDataModule):
    """Has the batch size that finders change."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 1

    def train_dataloader(self) -> DataLoader[Any]:
        rows = [{name: value[0] for name, value in batch.items()} for batch in batches(16)]
        return DataLoader(rows, batch_size=self.batch_size)  # type: ignore[arg-type]  # a list is a dataset

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(1)


class _Frames(callbacks.Callback):
    """Counts what torch.compile has compiled by the end of every step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.counts.append(torch._dynamo.utils.counters["frames"]["total"])


def compiled(trainer: Trainer, module: GritLitModule, train: Any, validation: Any) -> None:
    torch._dynamo.reset()
    trainer.fit(torch.compile(module, backend="eager"), train)
    torch._dynamo.reset()
    frames = next(each for each in trainer.callbacks if isinstance(each, _Frames))  # type: ignore[attr-defined]
    require(frames.counts[-1] == frames.counts[-2], "every step is compiled anew, until torch gives up at the eighth")


def lr_find(trainer: Trainer, module: GritLitModule, train: Any, validation: Any, **settings: Any) -> None:
    Tuner(trainer).lr_find(module, train, validation, num_training=3, **settings)
    trainer.fit(module, train, validation)


def batch_size(trainer: Trainer, module: GritLitModule, train: Any, validation: Any) -> None:
    data = _Data()
    Tuner(trainer).scale_batch_size(module, datamodule=data, max_trials=2, steps_per_trial=1)
    require(data.batch_size == 4, f"the batch size that was found is {data.batch_size}")
    trainer.fit(module, datamodule=data)


def twice(trainer: Trainer, module: GritLitModule, train: Any, validation: Any) -> None:
    trainer.fit(module, train, validation)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, train, validation)


def packed() -> DataLoader[Any]:
    positions = torch.arange(TOKENS) % (TOKENS // 2)
    rows = [
        {name: value[:1] for name, value in batch.items()} | {"position_ids": positions[None]} for batch in batches()
    ]
    return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


# The cases.

TUNER: list[Case] = [
    Case("`Tuner.lr_find`", fit=lr_find, check=only_the_fit_was_heard),
    Case("`Tuner.lr_find(update_attr=False)`", fit=partial(lr_find, update_attr=False), check=only_the_fit_was_heard),
    Case("`Tuner.scale_batch_size`", fit=batch_size, check=only_the_fit_was_heard),
    Case("`LearningRateFinder`", trainer=lambda: {"callbacks": [callbacks.LearningRateFinder(num_training_steps=3)]}),
]


def _callback(make: Callable[[], callbacks.Callback]) -> Callable[[], dict[str, Any]]:
    return lambda: {"callbacks": [make()]}


AVERAGES: list[Case] = [
    Case(
        "`StochasticWeightAveraging`",
        trainer=lambda: {
            "callbacks": [callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1)],
            **ENDLESS,
            "max_epochs": 3,
        },
        loader=lambda: loader(2),
        steps=6,
        check=weights_are_averaged,
        exports=True,
    ),
    Case(
        "`EMAWeightAveraging`",
        trainer=_callback(lambda: callbacks.EMAWeightAveraging(decay=0.5)),
        check=weights_are_averaged,
        exports=True,
    ),
]


class _Plateau(ReduceLROnPlateau):
    """Of Lightning, as its command line builds it: with the metric to watch; here nothing ever is an improvement."""

    def __init__(self, optimizer: torch.optim.Optimizer, monitor: str = "val/loss") -> None:
        super().__init__(optimizer, monitor=monitor, patience=0, threshold=1e3, threshold_mode="abs")


def _schedule(make: Callable[..., Any], **settings: Any) -> dict[str, Any]:
    return {"lr_scheduler": partial(make, **settings)}


def _accumulating() -> dict[str, Any]:
    return ENDLESS | {"max_epochs": 2, "callbacks": [callbacks.GradientAccumulationScheduler({0: 1, 1: 2})]}


SCHEDULES: list[Case] = [
    Case("cosine, `max_steps`", check=schedule_ends_with_the_run),
    Case("cosine, `max_epochs`", trainer=lambda: ENDLESS | {"max_epochs": 1}, check=schedule_ends_with_the_run),
    Case(
        "cosine, `max_epochs`, data without a length",
        trainer=lambda: ENDLESS | {"max_epochs": 1},
        loader=lambda: DataLoader(_Stream(), batch_size=None),
        check=schedule_ends_with_the_run,
    ),
    Case(
        "cosine, `max_steps`, data without a length",
        loader=lambda: DataLoader(_Stream(), batch_size=None),
        check=schedule_ends_with_the_run,
    ),
    Case("cosine, `max_time` and `max_steps`", trainer=lambda: {"max_time": timedelta(hours=1)}),
    Case("cosine, `max_time` alone", trainer=lambda: ENDLESS | {"max_time": SOON}, steps=None),
    Case(
        "constant, `max_time` alone",
        trainer=lambda: ENDLESS | {"max_time": SOON},
        model={"lr_scheduler": None},
        steps=None,
    ),
    Case("cosine, `max_epochs: -1`", trainer=lambda: ENDLESS | {"max_epochs": -1, "max_time": SOON}, steps=None),
    Case("cosine, `GradientAccumulationScheduler`", trainer=_accumulating, steps=6, check=schedule_ends_with_the_run),
    Case(
        "constant, `GradientAccumulationScheduler`",
        trainer=_accumulating,
        model={"lr_scheduler": None},
        steps=6,
    ),
    Case("OneCycleLR", model=_schedule(lr_scheduler.OneCycleLR, max_lr=1e-2, total_steps=STEPS)),
    Case("StepLR", model=_schedule(lr_scheduler.StepLR, step_size=2), check=rate_was_reduced),
    Case("CosineAnnealingWarmRestarts", model=_schedule(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2)),
    Case(
        "ReduceLROnPlateau of Lightning's command line, with `monitor`",
        trainer=lambda: {"max_epochs": 3, "max_steps": 6},
        model={"lr_scheduler": _Plateau},
        loader=lambda: loader(2),
        steps=6,
        check=rate_was_reduced,
    ),
    Case("ReduceLROnPlateau of torch", model=_schedule(lr_scheduler.ReduceLROnPlateau)),
]


def _halved(run: Run) -> None:
    require(run.end.keys() == run.start.keys() and len(run.losses) == 2 * len(run.rates), "a step is not two batches")


FEATURES: list[Case] = [
    Case("`gradient_clip_val` by norm", trainer=lambda: {"gradient_clip_val": 0.1}),
    Case("by value", trainer=lambda: {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    Case(
        "`accumulate_grad_batches`",
        trainer=lambda: {"accumulate_grad_batches": 2},
        loader=lambda: loader(8),
        check=_halved,
    ),
    Case(
        "`torch.compile`",
        adapter=partial(lora, target_modules=["q_proj"]),
        trainer=lambda: {"callbacks": [_Frames()], "limit_val_batches": 0, "max_steps": 3},
        fit=compiled,
        steps=3,
        slow=True,
    ),
    Case("`overfit_batches`", trainer=lambda: {"overfit_batches": 1}),
    Case("`fast_dev_run`", trainer=lambda: {"fast_dev_run": 2}, steps=2),
    Case("`barebones`", trainer=lambda: {"barebones": True, "logger": None}),
    Case("`limit_train_batches`", trainer=lambda: {"limit_train_batches": 0.5}),
    Case("`detect_anomaly`", trainer=lambda: {"detect_anomaly": True}),
    Case("`deterministic`", trainer=lambda: {"deterministic": True}),
    Case("`inference_mode: false`", trainer=lambda: {"inference_mode": False}),
    Case("`strategy: ddp`, one process", trainer=lambda: {"strategy": "ddp"}),
    Case("`strategy: fsdp`", trainer=lambda: {"strategy": "fsdp"}),
    Case("`trainer.fit` called again", trainer=lambda: ENDLESS | {"max_epochs": 1}, fit=twice, steps=8),
    Case(
        "resumed at the end of an epoch, `max_epochs`",
        trainer=lambda: ENDLESS | {"max_epochs": 2},
        loader=lambda: loader(2),
        resumes=True,
    ),
    Case("resumed at the end of an epoch, `max_steps`", loader=lambda: loader(2), resumes=True),
    Case(
        "resumed at the end of an epoch, `max_steps` and `max_epochs`",
        trainer=lambda: {"max_epochs": 2},
        loader=lambda: loader(2),
        resumes=True,
    ),
    Case("`gradient_checkpointing`", model={"gradient_checkpointing": True}),
    Case("`trim_logits`", model={"trim_logits": True}),
    Case("`attn_implementation: eager`", model={"attn_implementation": "eager"}),
    Case("`attn_implementation: flash_attention_2`", model={"attn_implementation": "flash_attention_2"}),
    Case("documents packed into rows", loader=packed),
]


def _saving(make: Callable[[], callbacks.Checkpoint]) -> Callable[[], dict[str, Any]]:
    return lambda: {"callbacks": [make()], "enable_checkpointing": True}


CALLBACKS: list[Case] = [
    Case("`EarlyStopping`", trainer=_callback(lambda: callbacks.EarlyStopping("val/loss"))),
    Case("`ModelCheckpoint` with `monitor`", trainer=_saving(lambda: callbacks.ModelCheckpoint(monitor="val/loss"))),
    Case(
        "`ModelCheckpoint(save_weights_only=True)`",
        trainer=_saving(lambda: callbacks.ModelCheckpoint(save_weights_only=True)),
    ),
    Case("`LearningRateMonitor`", trainer=lambda: {"callbacks": [callbacks.LearningRateMonitor()], "logger": True}),
    Case("`DeviceStatsMonitor`", trainer=lambda: {"callbacks": [callbacks.DeviceStatsMonitor()], "logger": True}),
    Case(
        "`ThroughputMonitor`",
        trainer=lambda: {"callbacks": [callbacks.ThroughputMonitor(len)], "logger": True},
    ),
    Case(
        "`RichProgressBar`", trainer=lambda: {"callbacks": [callbacks.RichProgressBar()], "enable_progress_bar": True}
    ),
    Case("`SpikeDetection`", trainer=_callback(lambda: callbacks.SpikeDetection(window=2, warmup=1))),
    Case("`Timer`", trainer=_callback(lambda: callbacks.Timer(timedelta(hours=1)))),
    Case("`BackboneFinetuning`", trainer=_callback(lambda: callbacks.BackboneFinetuning(1))),
    Case("`ModelPruning`", trainer=_callback(lambda: callbacks.ModelPruning("l1_unstructured", amount=0.5))),
]


@pytest.mark.parametrize("case", TUNER, ids=lambda case: case.name)
def test_a_finder_runs_as_the_page_says(case: Case, compare: Compare) -> None:
    compare("Finding learning rates and batch sizes", TUNER, case)


@pytest.mark.parametrize("case", AVERAGES, ids=lambda case: case.name)
def test_weights_are_averaged_as_the_page_says(case: Case, compare: Compare) -> None:
    compare("Averaged weights", AVERAGES, case)


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda case: case.name)
def test_a_schedule_runs_as_the_page_says(case: Case, compare: Compare) -> None:
    compare("Schedules of the learning rate", SCHEDULES, case)


@pytest.mark.parametrize("case", FEATURES, ids=lambda case: case.name)
def test_a_feature_works_as_the_page_says(case: Case, compare: Compare) -> None:
    compare("Trainer and model settings", FEATURES, case)


@pytest.mark.parametrize("case", CALLBACKS, ids=lambda case: case.name)
def test_a_callback_works_as_the_page_says(case: Case, compare: Compare) -> None:
    compare("Lightning's callbacks", CALLBACKS, case)
