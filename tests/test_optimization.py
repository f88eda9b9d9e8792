"""How many steps a run takes, what schedules need, and what a Trainer is refused or warned for, under real Trainers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.callbacks import Reprojection, SpectraLogger
from grit_lightning.optimization import planned_steps
from grit_lightning.optimizers import EigenbasisAdam, NaturalAdam

Batches = list[dict[str, Tensor]]


class Stream(IterableDataset[dict[str, Tensor]]):
    """Batches without a length."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self._batches)


class Steps(Callback):
    """The rate of every optimizer step, and how many steps were planned."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.planned: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.planned = planned_steps(trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.fixture
def batches(random_batch: Callable[..., dict[str, Tensor]]) -> Batches:
    return [random_batch(length=8, seed=seed) for seed in range(6)]


@pytest.fixture
def make_module(make_tiny_llama: Callable[..., Any], lora_config: Callable[..., Any]) -> Callable[..., GritLitModule]:
    def make(**overrides: Any) -> GritLitModule:
        settings: dict[str, Any] = {"backbone": make_tiny_llama(num_hidden_layers=1), "adapter": lora_config()}
        return GritLitModule(**(settings | {"geometry": GeometryConfig(kfac_update_freq=1)} | overrides))

    return make


@pytest.fixture
def fit(tmp_path: Path, batches: Batches) -> Callable[..., pl.Trainer]:
    """Trains on the six batches, or on other data, and returns the Trainer."""

    def run(module: GritLitModule, data: Any = None, **overrides: Any) -> pl.Trainer:
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        trainer = pl.Trainer(**(settings | overrides))
        data = DataLoader(batches, batch_size=None) if data is None else data
        trainer.fit(module, data, DataLoader(batches[:1], batch_size=None))
        return trainer

    return run


# The number of steps.


@pytest.mark.parametrize(
    ("settings", "streamed"),
    [
        ({}, True),
        ({"max_epochs": None, "max_time": "00:00:00:01"}, False),
        ({"max_epochs": -1}, False),
        ({"max_epochs": -1}, True),
    ],
    ids=["no length", "max_time alone", "endless", "endless stream"],
)
def test_the_default_schedule_refuses_a_run_of_unknown_length(
    make_module: Callable[..., Any], fit: Callable[..., Any], batches: Batches, settings: dict[str, Any], streamed: bool
) -> None:
    data = DataLoader(Stream(batches), batch_size=None) if streamed else None
    with pytest.raises(MisconfigurationException, match=r"trainer\.max_steps: expected .*model\.lr_scheduler"):
        fit(make_module(), data, **settings)


@pytest.mark.parametrize(
    ("settings", "streamed", "expected"),
    [
        ({}, False, 6),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, False, 4),
        ({"max_epochs": -1, "max_steps": 8}, True, 8),
        ({"limit_train_batches": 4}, True, 4),
        ({"max_epochs": -1, "max_steps": 3, "max_time": "00:01:00:00"}, False, 3),
        ({"max_epochs": 3, "callbacks": {0: 1, 1: 2, 2: 4}}, False, 6 + 3 + 2),
        ({"max_epochs": 3, "max_steps": 8, "callbacks": {1: 5}}, False, 8),
        ({"max_epochs": -1, "max_steps": 7, "callbacks": {0: 4}}, False, 7),
    ],
)
def test_the_default_schedule_ends_with_the_run(
    make_module: Callable[..., Any],
    fit: Callable[..., Any],
    batches: Batches,
    settings: dict[str, Any],
    streamed: bool,
    expected: int,
) -> None:
    steps, settings = Steps(), dict(settings)
    sizes = settings.pop("callbacks", None)
    callbacks = [steps] if sizes is None else [steps, GradientAccumulationScheduler(sizes)]
    fit(
        make_module(),
        DataLoader(Stream(batches), batch_size=None) if streamed else None,
        callbacks=callbacks,
        **settings,
    )
    assert steps.planned == len(steps.rates) == expected
    warmup = round(0.05 * expected)
    shares = [n / (expected - warmup) for n in range(expected - warmup)]  # of the decay, before each step
    decay = [0.5e-3 * (1 + math.cos(math.pi * share)) for share in shares]
    assert steps.rates == pytest.approx([0.0] * warmup + decay)


def test_a_constant_rate_needs_no_number_of_steps(
    make_module: Callable[..., Any], fit: Callable[..., Any], batches: Batches
) -> None:
    steps = Steps()
    fit(make_module(lr_scheduler=None), DataLoader(Stream(batches), batch_size=None), callbacks=[steps])
    assert (steps.rates, steps.planned) == ([1e-3] * 6, None)


# Schedules.


@pytest.mark.parametrize(
    ("monitor", "rates"),
    [
        ("val/loss", [1.0] * 6 + [0.1] * 6 + [0.01] * 6),  # asked once an epoch
        ("train/loss", [0.1**cuts for cuts in range(8)]),  # asked once a step
    ],
)
def test_a_plateau_scheduler_sees_what_it_monitors(
    make_module: Callable[..., Any], fit: Callable[..., Any], monitor: str, rates: list[float]
) -> None:
    """No loss becomes negative, as this threshold asks for: every look cuts the rate."""

    def plateau(optimizer: Any) -> Any:
        return ReduceLROnPlateau(optimizer, monitor=monitor, patience=0, threshold=2.0)

    steps = Steps()
    module = make_module(lr_scheduler=plateau, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    fit(module, max_epochs=3, callbacks=[steps])
    assert steps.rates[: len(rates)] == pytest.approx(rates)


def test_a_key_that_is_never_logged_is_named(make_module: Callable[..., Any], fit: Callable[..., Any]) -> None:
    with pytest.raises(MisconfigurationException, match="metric val/nothing which is not available"):
        fit(make_module(lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/nothing")))


def test_torchs_plateau_without_a_monitor_is_refused(make_module: Callable[..., Any], fit: Callable[..., Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"model\.lr_scheduler: expected a ReduceLROnPlateau that says"):
        fit(make_module(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau))


def test_lightnings_description_of_a_scheduler_is_passed_on(
    make_module: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    def by_epoch(optimizer: Any) -> dict[str, Any]:
        return {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "epoch"}

    steps = Steps()
    fit(make_module(lr_scheduler=by_epoch), max_epochs=2, callbacks=[steps])
    assert steps.rates == [1e-3] * 6 + [5e-4] * 6


# What cannot work.


def test_a_fused_optimizer_under_a_scaler_is_refused(make_module: Callable[..., Any], fit: Callable[..., Any]) -> None:
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    module = make_module(optimizer=lambda parameters: torch.optim.AdamW(parameters, fused=True))
    with pytest.raises(MisconfigurationException, match=r"model\.optimizer: expected .* got AdamW with fused=True"):
        fit(module, plugins=[precision])


@pytest.mark.parametrize(
    ("callback", "instead"),
    [
        (lambda: StochasticWeightAveraging(1e-3), "EMAWeightAveraging"),
        (lambda: ModelPruning("l1_unstructured"), "RankAdaptation"),
    ],
)
def test_callbacks_that_look_at_the_model_before_it_is_built_are_refused(
    make_module: Callable[..., Any], fit: Callable[..., Any], callback: Callable[[], Callback], instead: str
) -> None:
    given = callback()
    with pytest.raises(
        MisconfigurationException, match=rf"trainer\.callbacks: .* got {type(given).__name__}.*{instead}"
    ):
        fit(make_module(), callbacks=[given])


# What cannot act.


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    """Names of the settings that the run has said to be without effect."""
    return [str(w.message).partition(":")[0] for w in caught if "nothing reads it here" in str(w.message)]


@pytest.mark.parametrize(
    ("optimizer", "changed", "ignored"),
    [
        (EigenbasisAdam, {"kfac_damping": 0.5}, ["kfac_damping"]),
        (EigenbasisAdam, {"damping_mode": "absolute"}, ["damping_mode"]),
        (
            EigenbasisAdam,
            {"grafting": False, "trust_clip": 2.0, "pairing": "swapped"},
            ["grafting", "pairing", "trust_clip"],
        ),
        (EigenbasisAdam, {"ng_warmup_steps": 2, "kfac_min_samples": 9, "ema_beta": 0.5, "kfac_update_freq": 2}, []),
        (NaturalAdam, {"kfac_damping": 0.5, "damping_mode": "absolute", "ng_warmup_steps": 2}, []),
        (
            NaturalAdam,
            {"grafting": False, "trust_clip": 2.0, "pairing": "swapped"},
            ["grafting", "pairing", "trust_clip"],
        ),
        (torch.optim.AdamW, {"kfac_damping": 0.5, "grafting": False, "trust_clip": 2.0, "pairing": "swapped"}, []),
        (torch.optim.AdamW, {"kfac_damping": 0.5, "ng_warmup_steps": None}, ["kfac_damping"]),
        (torch.optim.AdamW, {"kfac_damping": 0.5, "kfac_update_freq": 7}, ["kfac_damping"]),
        (EigenbasisAdam, {"ng_warmup_steps": 6}, ["ng_warmup_steps"]),
        (torch.optim.AdamW, {"damping_reference_tokens": 9}, ["damping_reference_tokens"]),
        (torch.optim.AdamW, {"damping_reference_tokens": 9, "damping_mode": "batch_aware"}, []),
        (torch.optim.AdamW, {"ema_beta": 0.5, "cov_averaging": "mean"}, ["ema_beta"]),
        (torch.optim.AdamW, {"penalty_warmup_steps": 5}, ["penalty_warmup_steps"]),
        (EigenbasisAdam, {"penalty_warmup_steps": 5, "curvature_penalty": 0.1}, []),
    ],
)
def test_a_changed_setting_that_nothing_reads_is_said_once(
    make_module: Callable[..., Any],
    fit: Callable[..., Any],
    optimizer: Any,
    changed: dict[str, Any],
    ignored: list[str],
) -> None:
    geometry = GeometryConfig(**({"kfac_update_freq": 1} | changed))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make_module(geometry=geometry, optimizer=optimizer))
    assert sorted(said(caught)) == [f"GeometryConfig.{name}" for name in ignored]


def test_a_warm_up_of_a_schedule_that_has_none_is_said(
    make_module: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    with pytest.warns(UserWarning, match=r"GritLitModule\.warmup_fraction: .* It acts with lr_scheduler: cosine"):
        fit(make_module(lr_scheduler=None, warmup_fraction=0.5))


def test_a_warning_names_what_reads_the_setting(make_module: Callable[..., Any], fit: Callable[..., Any]) -> None:
    geometry = GeometryConfig(kfac_update_freq=1, kfac_damping=0.5)
    with pytest.warns(
        UserWarning, match=r"kfac_damping: .* got 0\.5\. It acts with .*torch\.optim\.AdamW or NaturalAdam"
    ):
        fit(make_module(geometry=geometry))


# Searches before a run.


SETS_THE_RATE = r"update_attr: expected False.*model\.optimizer"


def test_a_search_that_would_set_the_rate_is_refused(make_module: Any, fit: Any) -> None:
    with pytest.raises(MisconfigurationException, match=SETS_THE_RATE):
        fit(make_module(), callbacks=[LearningRateFinder()])


def test_a_tuner_that_would_set_the_rate_is_refused(make_module: Any, batches: Batches, tmp_path: Path) -> None:
    data, quiet = DataLoader(batches, batch_size=None), {"logger": False, "enable_checkpointing": False}
    tuner = Tuner(pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **quiet))
    with pytest.raises(MisconfigurationException, match=SETS_THE_RATE):
        tuner.lr_find(make_module(), data, data)


def test_a_search_that_sets_nothing_leaves_no_trace(make_module: Any, fit: Any) -> None:
    """Neither in the statistics nor in the weights, whether its last window was full or not."""
    plain, searched = (make_module(optimizer=EigenbasisAdam) for _ in range(2))
    torch.manual_seed(0)
    fit(plain, accumulate_grad_batches=2)
    torch.manual_seed(0)
    finder = LearningRateFinder(num_training_steps=3, update_attr=False)
    fit(searched, callbacks=[finder], accumulate_grad_batches=2)
    assert finder.optimal_lr is not None
    assert len(finder.optimal_lr.results["loss"]) > 0
    assert all(map(torch.equal, plain.state_dict().values(), searched.state_dict().values()))
    for name, view in plain.geometry.layers.items():
        other = searched.geometry.layers[name]
        assert (view.n_samples, view.counters) == (other.n_samples, other.counters)
        assert torch.equal(view.a_cov, other.a_cov)
        assert torch.equal(view.g_cov, other.g_cov)


def test_an_optimizer_that_cannot_follow_a_reprojection_is_refused_before_the_first_step(
    make_module: Any, fit: Any
) -> None:
    steps = Steps()
    with pytest.raises(ValueError, match=r"model\.optimizer: expected .* LBFGS"):
        fit(make_module(optimizer=torch.optim.LBFGS), callbacks=[Reprojection(every_n_steps=2), steps])
    assert steps.rates == []
    once = {"limit_train_batches": 1}  # LBFGS asks for the loss twenty times a step
    fit(make_module(optimizer=torch.optim.LBFGS), callbacks=[SpectraLogger(), steps], **once)  # which only looks
    assert len(steps.rates) > 0


# Half precision.


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adamax])
def test_an_optimizer_that_would_divide_by_zero_in_float16_is_refused(
    make_module: Any, fit: Any, kind: type[torch.optim.Optimizer]
) -> None:
    with pytest.raises(
        MisconfigurationException, match=rf"model\.optimizer: .*eps.* {kind.__name__} .*model\.dtype to"
    ):
        fit(make_module(optimizer=kind), precision="16-true")


@pytest.mark.filterwarnings("ignore:trainer.precision")
@pytest.mark.parametrize(
    "optimizer", [EigenbasisAdam, torch.optim.SGD, lambda parameters: torch.optim.AdamW(parameters, eps=1e-4)]
)
def test_an_optimizer_that_can_divide_in_float16_trains(make_module: Any, fit: Any, optimizer: Any) -> None:
    assert fit(make_module(optimizer=optimizer), precision="16-true").global_step == 6
