"""From the recipe to optimizer and schedule: how many steps a run takes, and what of it cannot work or cannot act."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import get_cosine_schedule_with_warmup

from grit_lightning.geometry.config import PRECONDITIONING, GeometryConfig
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.ignored_settings import warn_if_ignored
from grit_lightning.optimizers import EigenbasisAdam, GeometryAdam, NaturalAdam

SchedulerFactory = LRSchedulerCallable | Literal["cosine"]


def build_optimizer(
    factory: OptimizerCallable | None, parameters: list[Tensor], geometry: RankSpaceGeometry | None
) -> Optimizer:
    """Build the optimizer.

    Args:
        factory: From the parameters to an optimizer; None for `EigenbasisAdam`, or AdamW without a geometry.
        parameters: The trained parameters.
        geometry: The geometry, or None.
    """
    return (factory or (AdamW if geometry is None else EigenbasisAdam))(parameters)


def build_schedule(
    factory: SchedulerFactory, optimizer: Optimizer, trainer: pl.Trainer, warmup_fraction: float
) -> LRSchedulerConfigType:
    """Build the schedule of the learning rate, as Lightning wants it described.

    Args:
        factory: From the optimizer to a scheduler, or to Lightning's description of one; or `cosine`.
        optimizer: The optimizer.
        trainer: Whose steps the `cosine` schedule covers.
        warmup_fraction: Part of those steps that it warms up for.

    Returns:
        The scheduler, stepped once per optimizer step. One that waits for a plateau is asked once an epoch, or once a step
        where it monitors a quantity of the training steps.

    Raises:
        MisconfigurationException: If the `cosine` schedule is asked for and the number of steps is not known, or nothing says
            what a plateau is looked for in.
    """
    if factory == "cosine":
        steps = _require_planned_steps(trainer)
        scheduler: Any = get_cosine_schedule_with_warmup(optimizer, round(warmup_fraction * steps), steps)
    else:
        scheduler = factory(optimizer)
    if isinstance(scheduler, Mapping):
        description: Any = {"interval": "step", **scheduler}
        return cast(LRSchedulerConfigType, description)
    if not isinstance(scheduler, ReduceLROnPlateau):
        return {"scheduler": scheduler, "interval": "step"}
    monitor = getattr(scheduler, "monitor", None)
    if monitor is None:
        raise MisconfigurationException(
            "model.lr_scheduler: expected a ReduceLROnPlateau that says what it monitors, got torch's, which does not. Set it "
            "to lightning.pytorch.cli.ReduceLROnPlateau with monitor: val/loss."
        )
    return {"scheduler": scheduler, "monitor": monitor, "interval": "step" if monitor.startswith("train/") else "epoch"}


def planned_steps(trainer: pl.Trainer) -> int | None:
    """Return how many optimizer steps the fit takes if nothing ends it early; None if that is not known beforehand."""
    estimate = trainer.estimated_stepping_batches  # loads the data if their length is needed
    if not math.isfinite(estimate) or estimate < 0:
        return None
    epochs, batches = trainer.max_epochs or 0, trainer.num_training_batches
    sizes = [callback for callback in trainer.callbacks if isinstance(callback, GradientAccumulationScheduler)]  # type: ignore[attr-defined]  # set outside the Trainer's __init__
    if not sizes or epochs < 0 or not math.isfinite(batches):
        return int(estimate)
    # Lightning reckons with the size of the first window; the last window of an epoch may be shorter than the others.
    steps = sum(math.ceil(batches / sizes[-1].get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)


def steps_of_the_run(trainer: pl.Trainer) -> int | None:
    """Return `planned_steps`, or None in `fast_dev_run`, whose few steps stand for those of a longer run."""
    return None if trainer.fast_dev_run else planned_steps(trainer)  # type: ignore[attr-defined]  # as above


def _require_planned_steps(trainer: pl.Trainer) -> int:
    steps = planned_steps(trainer)
    if steps is None:
        endless = trainer.max_epochs == -1
        raise MisconfigurationException(
            "trainer.max_steps: expected the number of optimizer steps, which the default schedule of the learning rate needs, "
            f"got {'neither it nor max_epochs' if endless else 'none, and data without a length'}. Set trainer.max_steps, or "
            "set model.lr_scheduler to null for a constant rate or to a scheduler that needs no number of steps."
        )
    return steps


def require_rate_is_kept(trainer: pl.Trainer) -> None:
    """Refuse a search for the learning rate that wants to set it: the optimizer's constructor alone does.

    Raises:
        MisconfigurationException: If `LearningRateFinder`, which `Tuner.lr_find` uses too, updates the rate.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # as above
        if isinstance(callback, LearningRateFinder) and getattr(callback, "_update_attr", False):
            raise MisconfigurationException(
                "LearningRateFinder.update_attr: expected False, since the learning rate belongs to model.optimizer, got True. "
                "Set it to False, also in Tuner.lr_find, and give model.optimizer the rate that suggestion() returns."
            )


def require_usable(optimizer: Optimizer, trainer: pl.Trainer) -> None:
    """Refuse an optimizer whose work would come at the wrong time.

    Raises:
        MisconfigurationException: If the optimizer un-scales AMP gradients itself (fused), so that the preconditioner would
            see scaled ones, or if it divides by moments that float16 rounds to zero.
    """
    _require_divisible(optimizer)
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise MisconfigurationException(
            "model.optimizer: expected one that does not un-scale fp16 gradients itself, after preconditioning, "
            f"got {type(optimizer).__name__} with fused=True. Set fused=False, or trainer.precision to bf16-mixed."
        )


def require_usable_callbacks(trainer: pl.Trainer) -> None:
    """Refuse callbacks that look at the model before `configure_model` has built it, or want one of another kind.

    Raises:
        MisconfigurationException: If there is one.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # as above
        if isinstance(callback, BaseFinetuning):
            raise MisconfigurationException(
                "trainer.callbacks: expected one that leaves the backbone frozen, of which a checkpoint holds nothing, got "
                f"{type(callback).__name__}. Remove it; adapter.modules_to_save trains whole modules beside the adapter."
            )
        if isinstance(callback, StochasticWeightAveraging):
            raise MisconfigurationException(
                "trainer.callbacks: expected one that averages the weights that are trained, got StochasticWeightAveraging, "
                "which copies the model before it is built. Use lightning.pytorch.callbacks.WeightAveraging or "
                "EMAWeightAveraging."
            )
        if isinstance(callback, ModelPruning):
            raise MisconfigurationException(
                "trainer.callbacks: expected one that finds the weights that are trained, got ModelPruning, which looks for "
                "them before the model is built. Remove it; RankAdaptation makes the adapter smaller."
            )


def _require_divisible(optimizer: Optimizer) -> None:
    """Refuse an optimizer of torch that keeps moments in float16 with an `eps` that is zero there: it would divide 0 by 0."""
    for settings in optimizer.param_groups if type(optimizer).__module__.startswith("torch.optim") else []:
        eps, half = settings.get("eps"), any(p.dtype == torch.float16 for p in settings["params"])
        if half and isinstance(eps, float) and not torch.tensor(eps, dtype=torch.float16):
            raise MisconfigurationException(
                f"model.optimizer: expected an eps that is more than zero in float16, got {type(optimizer).__name__} with "
                f"eps={eps:g}, which is not and lets it divide 0 by 0. To train the adapter in float32, set model.dtype to "
                "float16 and trainer.precision to 32-true; or set eps to 1e-4."
            )


def warn_of_settings(trainer: pl.Trainer, config: GeometryConfig | None) -> None:
    """Say when half precision rounds the adapter too, and which settings of the geometry were changed that nothing reads.

    Args:
        trainer: With its optimizers built.
        config: Settings of the geometry, or None without one.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin, HalfPrecision):
        name, digits = ("bfloat16", 8) if plugin.precision == "bf16-true" else ("float16", 11)
        rank_zero_warn(
            f"trainer.precision: {plugin.precision} keeps the adapter's weights in {name} too: what a step changes by less "
            f"than 1/{2**digits} of a weight is lost. To train the adapter in float32, set model.dtype to {name} and "
            "trainer.precision to 32-true."
        )
    if config is not None:
        for optimizer in trainer.optimizers:
            warn_if_ignored(GeometryConfig, config.to_dict(), _readers(config, optimizer, steps_of_the_run(trainer)))


def _readers(config: GeometryConfig, optimizer: Optimizer, steps: int | None) -> dict[str, str]:
    """By each setting that nothing reads, what would read it."""
    readers = {}
    if config.damping_mode != "batch_aware":
        readers["damping_reference_tokens"] = "damping_mode: batch_aware"
    if config.cov_averaging != "ema":
        readers["ema_beta"] = "cov_averaging: ema"
    if not config.regularised:
        readers["penalty_warmup_steps"] = "curvature_penalty or reprojection_penalty above 0"
    if isinstance(optimizer, GeometryAdam):
        for name in PRECONDITIONING - optimizer.reads:
            others = [rule.__name__ for rule in (EigenbasisAdam, NaturalAdam) if name in rule.reads]
            readers[name] = " or ".join(
                ["optimizers that take preconditioned gradients, as torch.optim.AdamW", *others]
            )
    if config.ng_warmup_steps is None:
        acting = PRECONDITIONING - {"ng_warmup_steps"}
        return readers | dict.fromkeys(acting, "ng_warmup_steps as a number: null never preconditions")
    begins = max(config.ng_warmup_steps + 1, config.kfac_update_freq)
    if steps is not None and steps < begins:
        late = f"a run that reaches step {begins}, where kfac_update_freq and ng_warmup_steps let preconditioning begin"
        readers |= dict.fromkeys(PRECONDITIONING, f"{late} (this one takes {steps} steps)")
    return readers
