"""An optimizer that averages weights, in a run: what is validated is what is saved, and looking changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.callbacks import RankAdaptation, Reprojection

pytestmark = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:The number of training batches .* is smaller than the logging interval",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
)
SHARE = 0.9
"""Part of the average in the point where gradients are taken."""


class ScheduleFree(torch.optim.Optimizer):
    """SGD as `schedulefree` does it: refuses to step unless it has been switched to training."""

    def __init__(self, parameters: Any, lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr, "train_mode": False, "steps": 0})

    def train(self) -> None:
        self._switch(1 - SHARE, training=True)

    def eval(self) -> None:
        self._switch(1 - 1 / SHARE, training=False)

    @torch.no_grad()
    def _switch(self, weight: float, training: bool) -> None:
        for settings in self.param_groups:
            if settings["train_mode"] is not training:
                for p in settings["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)
            settings["train_mode"] = training

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        (settings,) = self.param_groups
        assert settings["train_mode"], "not in train mode when step is called"
        with torch.enable_grad():
            loss = None if closure is None else closure()
        settings["steps"] += 1
        for p in settings["params"]:
            z = self.state[p].setdefault("z", p.clone())
            average = p.lerp(z, 1 - 1 / SHARE)
            z.sub_(p.grad, alpha=settings["lr"])
            p.copy_(average.lerp(z, 1 / settings["steps"]).lerp(z, 1 - SHARE))
        return loss


@pytest.fixture
def run(
    make_tiny_llama: Callable[..., Any],
    lora_config: Callable[..., Any],
    random_batch: Callable[..., Any],
    tmp_path: Path,
) -> Callable[..., tuple[GritLitModule, pl.Trainer]]:
    """Trains six micro-batches, two a step."""

    def fit(ckpt_path: Path | None = None, **overrides: Any) -> tuple[GritLitModule, pl.Trainer]:
        torch.manual_seed(0)
        config = GeometryConfig(kfac_update_freq=1, kfac_min_samples=1)
        model = {"optimizer": ScheduleFree, "lr_scheduler": None}
        module = GritLitModule(make_tiny_llama(num_hidden_layers=1), lora_config(), config, **model)
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "accumulate_grad_batches": 2,
            "default_root_dir": tmp_path,
        }
        trainer = pl.Trainer(**(settings | overrides))
        batches = [random_batch(length=8)] * 6  # so that a resumed run has the same ones
        loaders = (DataLoader(rows, batch_size=None) for rows in (batches, batches[:1]))
        trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=True)
        return module, trainer

    return fit


class _Watch(pl.Callback):
    """Saves after every step, and remembers what was validated."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.validated: list[dict[str, Tensor]] = []
        self.saved: list[dict[str, Tensor]] = []

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.validated.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        path = self.folder / f"{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append(torch.load(path, weights_only=True)["state_dict"])


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_saved_is_what_was_validated_and_is_the_average(run: Any, tmp_path: Path) -> None:
    watch = _Watch(tmp_path)
    module, trainer = run(callbacks=[watch])
    (optimizer,) = trainer.optimizers
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)
    assert trainer.global_step == 3
    assert _same(saved["state_dict"], watch.validated[-1])
    assert _same(saved["state_dict"], module.state_dict())
    assert not optimizer.param_groups[0]["train_mode"]
    assert any(not torch.equal(p, optimizer.state[p]["z"]) for p in optimizer.state)


def test_validating_and_saving_change_no_bit_of_the_training(run: Any, tmp_path: Path) -> None:
    plain, _ = run(limit_val_batches=0)
    watched, _ = run(callbacks=[_Watch(tmp_path)], val_check_interval=2)
    assert _same(plain.state_dict(), watched.state_dict())


def test_the_middle_of_a_window_is_validated_at_the_average(run: Any, tmp_path: Path) -> None:
    watch = _Watch(tmp_path)
    run(callbacks=[watch], val_check_interval=5)  # the third window is half done
    after_a_step, in_a_window = watch.saved[3], watch.saved[4]
    for name, value in watch.validated[0].items():
        torch.testing.assert_close(value, after_a_step[name], rtol=0, atol=1e-7)
    assert not all(torch.allclose(after_a_step[name], in_a_window[name], rtol=0, atol=1e-5) for name in after_a_step)


def test_a_step_that_a_scaler_skips_leaves_the_average_in_place(run: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # overflows at every step of the run
    _, trainer = run(plugins=MixedPrecision("16-mixed", "cpu", scaler), limit_val_batches=0)
    assert scaler.get_scale() == 2.0**124
    assert not trainer.optimizers[0].param_groups[0]["train_mode"]


def test_a_resumed_run_has_the_same_bits(run: Any, tmp_path: Path) -> None:
    whole, _ = run(callbacks=[_Watch(tmp_path)])
    resumed, _ = run(ckpt_path=tmp_path / "2.ckpt")
    assert _same(whole.state_dict(), resumed.state_dict())


def test_the_average_stays_within_the_ranks(run: Any) -> None:
    callbacks = [RankAdaptation(every_n_steps=1, min_rank=1, threshold=0.3), Reprojection(every_n_steps=1)]
    module, trainer = run(callbacks=callbacks)
    (optimizer,) = trainer.optimizers
    (group,) = module.geometry.groups
    assert int(group.ranks.min()) < group.r
    for b, rank in zip(group.factors("b"), group.ranks.tolist(), strict=True):
        assert not b[:, rank:].any()
        assert not optimizer.state[b]["z"][:, rank:].any()
