"""The example of transformers' Trainer: it measures and trains as Lightning does on the same batches.

Tolerance: one loss is a mean of sums, the other a sum over a count; float32 rounds them differently in the last digit, Σ_g and
weights of a few steps by some 1e-6 of their size. A gradient that is scaled wrongly changes Σ_g by a factor.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.callbacks import RankAdaptation, Reprojection
from grit_lightning.optimizers import EigenbasisAdam

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
RTOL = 1e-3
SETTINGS = GeometryConfig(kfac_update_freq=2, kfac_min_samples=1, curvature_penalty=1e-3)
OPTIMIZERS = {"adamw": torch.optim.AdamW, "eigenbasis": EigenbasisAdam}


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=RTOL * float(expected.abs().max()))


@pytest.fixture
def backbone(make_tiny_llama: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: make_tiny_llama(num_hidden_layers=1)


@pytest.fixture
def make_trainer(example: Any, backbone: Any, lora_config: Any, tmp_path: Path) -> Callable[..., Any]:
    """A trainer over batches given one a micro-batch, two a step."""

    def make(batches: list[dict[str, Tensor]], optimizer: str = "adamw", lr: float = 1e-2, **overrides: Any) -> Any:
        settings: dict[str, Any] = {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.5,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": False,
        }
        own = {name: overrides.pop(name) for name in ("reprojection", "ranks") if name in overrides}
        fp16 = overrides.pop("fp16", False)
        arguments = TrainingArguments(str(tmp_path / "hf"), **(settings | overrides))
        arguments.fp16 = fp16  # which would be refused on a CPU
        torch.manual_seed(3)
        model = get_peft_model(backbone(), lora_config()).train()
        return example("hf_trainer").GeometryTrainer(
            model,
            arguments,
            train_dataset=batches,
            eval_dataset=batches,
            data_collator=lambda rows: dict(rows[0]),
            optimizer_cls_and_kwargs=(OPTIMIZERS[optimizer], {"lr": lr}),
            geometry=SETTINGS,
            **own,
        )

    return make


@pytest.fixture
def in_lightning(backbone: Any, lora_config: Any, tmp_path: Path) -> Callable[..., GritLitModule]:
    def fit(
        batches: list[dict[str, Tensor]], optimizer: str = "adamw", lr: float = 1e-2, *callbacks: pl.Callback
    ) -> GritLitModule:
        torch.manual_seed(3)
        module = GritLitModule(
            backbone(),
            lora_config(),
            SETTINGS,
            optimizer=lambda parameters: OPTIMIZERS[optimizer](parameters, lr=lr),
            lr_scheduler=None,
        )
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            default_root_dir=tmp_path,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=list(callbacks),
            **quiet,
        ).fit(module, DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None))
        return module

    return fit


def assert_same_statistics(found: Any, expected: Any) -> None:
    assert found.layers.keys() == expected.layers.keys()
    for name, view in found.layers.items():
        assert view.n_samples == expected.layers[name].n_samples > 0
        assert_close(view.a_cov, expected.layers[name].a_cov)
        assert_close(view.g_cov, expected.layers[name].g_cov)
        assert float(view.a_cov.abs().max()) > 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_batches_give_the_same_statistics_and_weights(
    make_trainer: Any, in_lightning: Any, random_batch: Any, optimizer: str
) -> None:
    """Label tokens are as many in every micro-batch: Lightning means them by micro-batch, transformers by step."""
    batches = [random_batch(batch=2, length=10, pad=[1, 3], prompt=2, seed=seed) for seed in range(8)]
    events = [Reprojection("balanced", every_n_steps=2, stop_step=2), RankAdaptation(every_n_steps=2, threshold=0.9)]
    module = in_lightning(batches, optimizer, 1e-2, *events)
    fresh = {"reprojection": Reprojection("balanced", every_n_steps=2, stop_step=2)}
    trainer = make_trainer(batches, optimizer, **fresh, ranks=RankAdaptation(every_n_steps=2, threshold=0.9))
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.steps.geometry.reprojection_count == module.geometry.reprojection_count == 1
    assert trainer.steps.geometry.ranks == module.geometry.ranks
    assert_same_statistics(trainer.steps.geometry, module.geometry)
    expected = dict(module.peft_model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert_close(parameter.detach(), expected[name].detach())


def test_statistics_do_not_depend_on_who_divides_the_loss(
    make_trainer: Any, in_lightning: Any, random_batch: Any
) -> None:
    """With unequal numbers of label tokens, a last step of one micro-batch, and without transformers' count of labels."""
    batches = [random_batch(batch=2, length=10, pad=[0, seed], prompt=seed, seed=seed) for seed in range(5)]
    module = in_lightning(batches, "adamw", 0.0)
    counted, uncounted = make_trainer(batches, lr=0.0), make_trainer(batches, lr=0.0)
    uncounted.model_accepts_loss_kwargs = False
    for trainer in (counted, uncounted):
        trainer.train()
        assert trainer.state.global_step == 3
        assert_same_statistics(trainer.steps.geometry, module.geometry)


def test_a_resumed_training_is_the_one_that_never_stopped(make_trainer: Any, random_batch: Any, tmp_path: Path) -> None:
    batches = [random_batch(batch=2, length=10, seed=seed) for seed in range(8)]

    def make() -> Any:
        events = {
            "reprojection": Reprojection(every_n_steps=1),
            "ranks": RankAdaptation(every_n_steps=2, threshold=0.9),
        }
        return make_trainer(batches, "eigenbasis", save_strategy="steps", save_steps=2, **events)

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "hf" / "checkpoint-2"))
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    for name, view in resumed.steps.geometry.layers.items():
        assert torch.equal(view.g_cov, whole.steps.geometry.layers[name].g_cov)
    assert resumed.steps.geometry.ranks == whole.steps.geometry.ranks


@pytest.mark.parametrize("setting", ["fp16", "load_best_model_at_end", "several processes"])
def test_what_it_cannot_serve_is_refused(
    make_trainer: Any, random_batch: Any, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    given: dict[str, Any] = {}
    if setting == "several processes":
        monkeypatch.setattr(TrainingArguments, "world_size", 2)
    elif setting == "fp16":
        given = {"fp16": True}
    else:
        given = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 500}
    with pytest.raises(ValueError, match=f"{setting}.*: expected none in a GeometryTrainer, got True"):
        make_trainer([random_batch()], **given)


def test_the_example_runs_as_it_stands(
    example: Any, tiny_backbone_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example("hf_trainer").main(str(tiny_backbone_dir), 4, "adamw_torch", tmp_path)
    said = capsys.readouterr().out
    assert "grit/rank" in said
    assert "Mean rank" in said
    assert "12 + 30 =" in said.splitlines()[-1]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "checkpoint-4" / "geometry.pt").is_file()
