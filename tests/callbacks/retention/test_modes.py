"""What each mode does to the adapter, under every rule and precision, and that a resumed run ends as one that never stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

from grit_lightning import GeometryHooks
from grit_lightning.callbacks import AdapterCheckpoint, RankAdaptation, Reprojection, Retention
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.cross_moments import CrossMoments
from grit_lightning.optimizers import EigenbasisAdam, NaturalAdam

from ...test_averaged_weights import ScheduleFree
from .test_without_trace import different

Factory = Callable[..., Any]
RULES = {
    "AdamW, preconditioned": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "EigenbasisAdam": lambda p: EigenbasisAdam(p, lr=1e-2),
    "NaturalAdam": lambda p: NaturalAdam(p, lr=1e-2),
    "schedule-free": lambda p: ScheduleFree(p, lr=0.5),
}
MODES: dict[str, dict[str, Any]] = {
    "at_end": {"mode": "at_end"},
    "periodic": {"mode": "periodic", "edit_every_n_steps": 2},
    "penalty": {"mode": "penalty"},
}


def size(module: Any) -> float:
    """Size of the adapter's update over all layers."""
    sites = [site for group in module.geometry.groups for site in group.sites]
    return float(sum((site.up.weight @ site.down.weight).detach().square().sum() for site in sites))


@pytest.mark.parametrize(
    ("rule", "mode"),
    [
        ("AdamW, preconditioned", "at_end"),
        ("AdamW, preconditioned", "penalty"),
        ("SGD", "periodic"),
        ("EigenbasisAdam", "periodic"),
        ("EigenbasisAdam", "penalty"),
        ("NaturalAdam", "periodic"),
        ("schedule-free", "periodic"),
        ("schedule-free", "at_end"),
    ],
)
def test_every_mode_pulls_towards_the_backbone_under_every_rule(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory, mode: str, rule: str
) -> None:
    def trained(mu: float) -> float:
        module = quick_module(optimizer=RULES[rule])
        pl.seed_everything(5, verbose=False)
        make_trainer(callbacks=[retention(mu=mu, **MODES[mode])], max_steps=4, max_epochs=-1).fit(module, loader(8))
        assert all(bool(value.isfinite().all()) for value in module.state_dict().values())
        return size(module)

    assert trained(0.0) > trained(100.0)


@pytest.mark.parametrize(
    ("precision", "mode"), [("bf16-mixed", "at_end"), ("16-mixed", "periodic"), ("16-mixed", "penalty")]
)
def test_half_precision_takes_the_same_statistics(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory, mode: str, precision: str
) -> None:
    """Also with a scaler, whose factor must not enter."""

    def trained(plugin: Any) -> tuple[Any, Any]:
        found, module = retention(mu=1.0, **MODES[mode]), quick_module({"lora_dropout": 0.0})
        make_trainer(callbacks=[found], plugins=plugin, max_steps=4, max_epochs=-1).fit(module, loader(8))
        (group,) = found.estimate.groups
        return group.g_cov, found.report()["retention"]

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if precision == "16-mixed" else None
    (full, exact), (half, rounded) = trained(None), trained(MixedPrecision(precision, "cpu", scaler))
    assert float((full - half).abs().max() / full.abs().max()) < 0.15  # 8 to 11 bits, after four steps
    for name in (name for name in exact if "cost" in name or name == "penalty"):
        assert rounded[name] == pytest.approx(exact[name], rel=0.3)


class Stopped(Exception):  # noqa: N818
    """Ends a run where a signal might have."""


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Stopped


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_ends_to_the_bit_as_one_that_never_stopped(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory, tmp_path: Path, mode: str
) -> None:
    def run(name: str, *callbacks: Callback, resume: bool = False, **settings: Any) -> dict[str, Any]:
        folder = tmp_path / name
        pl.seed_everything(5, verbose=False)
        own = [
            retention(**MODES[mode], **settings),
            Reprojection("balanced", every_n_steps=3),
            AdapterCheckpoint(folder, 2),
        ]
        trainer = make_trainer(callbacks=[*own, *callbacks], enable_checkpointing=True, max_steps=6, max_epochs=-1)
        same = DataLoader([next(iter(loader(1)))] * 8, batch_size=None)  # Lightning does not know where it was in these
        trainer.fit(quick_module(), same, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)
        saved: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
        (own_state,) = [state for key, state in saved["callbacks"].items() if "Retention" in key]
        return {name: saved[name] for name in ("state_dict", "optimizer_states", "grit")} | own_state

    whole = run("whole")
    with pytest.raises(Stopped):
        run("stopped", StopAt(5))
    assert different(whole, run("stopped", resume=True)) == []
    with pytest.raises(Stopped):
        run("changed", StopAt(3))
    with pytest.raises(ValueError, match=r"Retention\.texts: expected the general text that the checkpoint has"):
        run("changed", resume=True, max_blocks=3)


@pytest.mark.parametrize("interval", [1, 3])
def test_a_penalty_now_and_then_is_as_much_stronger(
    quick_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    retention: Factory,
    monkeypatch: pytest.MonkeyPatch,
    interval: int,
) -> None:
    weights: list[float] = []
    monkeypatch.setattr(CrossMoments, "add_penalty", lambda self, mu: weights.append(mu))
    found = retention(mode="penalty", mu=0.2, every_n_steps=interval)
    make_trainer(callbacks=[found], max_steps=6, max_epochs=-1).fit(quick_module(), loader(8))
    assert weights == pytest.approx([0.2 * interval] * (6 // interval))


class Own(pl.LightningModule):
    """A module of somebody else that calls the hooks."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        self.hooks = GeometryHooks(self, model, GeometryConfig(kfac_update_freq=2, kfac_min_samples=1))
        self.geometry = self.hooks.geometry

    def configure_optimizers(self) -> Any:
        return self.hooks.connect(torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.hooks.start_micro_batch(batch["attention_mask"], (batch["labels"][:, 1:] != -100).sum())
        return self.hooks.take_loss(self.model(**batch, use_cache=False).loss)

    def on_after_backward(self) -> None:
        self.hooks.on_after_backward()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.hooks.on_before_optimizer_step(optimizer)


@pytest.mark.parametrize("mode", MODES)
def test_a_module_of_somebody_else_retains_too(
    make_tiny_llama: Factory,
    lora_config: Factory,
    loader: Factory,
    make_trainer: Factory,
    retention: Factory,
    mode: str,
) -> None:
    def trained(mu: float) -> float:
        module = Own(get_peft_model(make_tiny_llama(), lora_config()))
        make_trainer(callbacks=[retention(mu=mu, **MODES[mode])], max_steps=4, max_epochs=-1).fit(module, loader(8))
        return size(module)

    assert trained(0.0) > trained(100.0)


def test_reduced_ranks_stay_reduced_when_edited(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory
) -> None:
    module = quick_module()
    callbacks = [
        Reprojection("balanced", every_n_steps=2, k=2),
        retention(mode="periodic", edit_every_n_steps=1, mu=5.0),
    ]
    make_trainer(callbacks=callbacks, max_steps=5, max_epochs=-1).fit(module, loader(8))
    assert set(module.geometry.ranks.values()) == {2}
    assert all(bool((site.up.weight[:, 2:] == 0).all()) for site in module.geometry.groups[0].sites)


def test_too_few_tokens_of_the_task_edit_nothing_and_say_so(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory
) -> None:
    module = quick_module(geometry=GeometryConfig(kfac_min_samples=100_000))
    found: Retention = retention(mu=1.0)
    with pytest.warns(UserWarning, match=r"Retention: expected 100000 tokens of the task .* so that nothing is edited"):
        make_trainer(callbacks=[found], max_steps=2, max_epochs=-1).fit(module, loader(8))
    assert found.unedited == found.report() == {}


def test_ranks_follow_the_metric(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory
) -> None:
    """With a μ so large that little would be left of what general text hears, other spectra decide."""

    def chosen(metric: str) -> list[tuple[str, int, str]]:
        module, ranks = quick_module(), RankAdaptation("balanced", threshold=0.9, min_rank=1, every_n_steps=2)
        callbacks = [retention(mu=1e3, metric=metric), ranks]
        make_trainer(callbacks=callbacks, max_steps=2, max_epochs=-1).fit(module, loader(8))
        assert [group.judged_by for group in module.geometry.groups] == [None]  # undone
        return [(decision.layer, decision.new, decision.reason) for decision in ranks.decisions]

    by_task, by_both = chosen("task"), chosen("retention")
    assert by_task
    assert by_both
    assert by_task != by_both
