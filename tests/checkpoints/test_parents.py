"""A module inside another one: whatever wraps it saves and loads its adapter, and a copy leaves the original alone.

- AveragedModel, Sequential, Module, compiled; strict loading still misses what is missing;
- a copy's statistics are its own;
- a run with Lightning's averaging of weights: the checkpoint holds the average, and is exported, resumed and loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.callbacks import RankAdaptation, Reprojection
from grit_lightning.export import export_adapter

DECAY = 0.5
ROUNDING = 1e-6  # of float32, in sums of a few terms below 1

Make = Callable[..., GritLitModule]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill in the parents."""
    if "parent" in metafunc.fixturenames:
        parents = {
            "averaged": AveragedModel,
            "sequential": nn.Sequential,
            "list": lambda module: nn.ModuleList([nn.ModuleList([module])]),
            "compiled": torch.compile,
        }
        metafunc.parametrize("parent", parents.values(), ids=parents.keys())


@pytest.fixture
def make_module(make_tiny_llama: Callable[..., LlamaForCausalLM], lora_config: Callable[..., LoraConfig]) -> Make:
    """A factory of modules on one backbone; every adapter starts elsewhere."""

    def make(seed: int = 1, **overrides: Any) -> GritLitModule:
        settings: dict[str, Any] = {
            "geometry": GeometryConfig(kfac_update_freq=1, kfac_min_samples=1),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            "lr_scheduler": None,
        }
        torch.manual_seed(seed)
        module = GritLitModule(make_tiny_llama(), lora_config(init_lora_weights=False), **(settings | overrides))
        module.configure_model()
        return module

    return make


def test_a_parent_saves_and_loads_the_adapter_and_nothing_else(make_module: Make, parent: Callable[..., Any]) -> None:
    saved, fresh = make_module(1), make_module(2)
    outer = parent(saved)
    state = outer.state_dict()
    own = {name: value for name, value in state.items() if name != "n_averaged"}
    assert len(own) == len(saved.state_dict()) == 8
    assert all("lora_" in name for name in own)
    assert next(iter(own)).endswith(next(iter(saved.state_dict())))
    other = parent(fresh)
    other.load_state_dict(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_parent_misses_what_is_missing_and_refuses_what_is_too_much(
    make_module: Make, parent: Callable[..., Any]
) -> None:
    outer = parent(make_module())
    state = outer.state_dict()
    name = next(name for name in state if "lora_A" in name)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "[^,]*lora_A[^,]*"\.'):
        outer.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"[^,]*lora_C"):
        outer.load_state_dict({**state, name.replace("lora_A", "lora_C"): state[name]})
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_A"):
        outer.load_state_dict({**state, name: torch.zeros(1, 1)})


def test_a_copy_keeps_statistics_of_its_own(make_module: Make, random_batch: Callable[..., dict[str, Tensor]]) -> None:
    original, batch = make_module(), random_batch()
    duplicate = copy.deepcopy(original)
    assert original.geometry is not None
    assert duplicate.geometry is not None
    for module in (original, duplicate):
        module.geometry.start_micro_batch(batch["attention_mask"], 1.0)  # type: ignore[union-attr]
    duplicate(batch).loss.backward()
    for module in (original, duplicate):
        module.geometry.finish_micro_batch()  # type: ignore[union-attr]
    heard = [
        sum(float(group.statistics.window.a.abs().sum()) for group in module.geometry.groups)  # type: ignore[union-attr]
        for module in (original, duplicate)
    ]
    assert heard[0] == 0.0
    assert heard[1] > 0.0


# Averaged weights.


class Weights(Callback):
    """Averages by itself what the optimizer leaves behind."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.current: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.current = {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}
        for name, value in self.current.items():
            self.average[name] = DECAY * self.average[name] + (1 - DECAY) * value if name in self.average else value


@pytest.fixture
def fit(random_batch: Callable[..., dict[str, Tensor]], tmp_path: Path) -> Callable[..., Trainer]:
    """`fit(module, *callbacks, max_steps=3)` on one batch again and again: wherever a loader is resumed, it is the same."""
    batches = [random_batch()] * 8

    def run(module: GritLitModule, *callbacks: Callback, max_steps: int = 3, ckpt_path: Path | None = None) -> Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(
            accelerator="cpu",
            max_steps=max_steps,
            callbacks=list(callbacks),
            enable_model_summary=False,
            default_root_dir=tmp_path,
            limit_val_batches=0,
            **quiet,  # type: ignore[arg-type]
        )
        loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        trainer.fit(module, loader, loader, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run


class SaveAt(Callback):
    """Writes a checkpoint after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


averaging = pytest.mark.filterwarnings(
    "ignore:You're using the WeightAveraging callback with a model that overrides the configure_model",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:The '.*_dataloader' does not have many workers",
)


@averaging
def test_a_checkpoint_holds_the_average_and_gives_it_back(
    make_module: Make,
    make_tiny_llama: Callable[..., LlamaForCausalLM],
    random_batch: Callable[..., dict[str, Tensor]],
    fit: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    weights, path = Weights(), tmp_path / "averaged.ckpt"
    fit(make_module(), EMAWeightAveraging(decay=DECAY), weights, SaveAt(3, path))
    saved = torch.load(path, weights_only=True)
    for name, value in weights.average.items():
        torch.testing.assert_close(saved["state_dict"][name], value, atol=ROUNDING, rtol=0)
        assert torch.equal(saved["current_model_state"][name], weights.current[name])
    assert max(float((weights.average[n] - weights.current[n]).abs().max()) for n in weights.average) > 1e-3

    loaded = GritLitModule.load_from_checkpoint(path, weights_only=True, backbone=make_tiny_llama())
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in loaded.state_dict().items())
    export_adapter(path, tmp_path / "exported")
    exported = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "exported").eval()
    batch = random_batch()
    with torch.no_grad():
        expected = loaded.eval()(batch).logits
        torch.testing.assert_close(exported(**batch).logits, expected, atol=1e-5, rtol=0)


@averaging
def test_an_averaged_run_goes_on_as_if_it_had_never_stopped(
    make_module: Make, fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    whole, begun, end = Weights(), tmp_path / "begun.ckpt", [tmp_path / "end.ckpt", tmp_path / "resumed.ckpt"]
    fit(make_module(), EMAWeightAveraging(decay=DECAY), whole, SaveAt(2, begun), SaveAt(4, end[0]), max_steps=4)
    resumed = Weights()
    fit(
        make_module(9),
        EMAWeightAveraging(decay=DECAY),
        resumed,
        SaveAt(4, end[1]),
        max_steps=4,
        ckpt_path=begun,
    )
    states = [torch.load(path, weights_only=True) for path in end]
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items()), part


@averaging
@pytest.mark.parametrize("callback", [Reprojection("balanced", every_n_steps=2), RankAdaptation(every_n_steps=2)])
def test_averages_over_changing_coordinates_are_refused(
    make_module: Make, fit: Callable[..., Trainer], callback: Callback
) -> None:
    with pytest.raises(MisconfigurationException, match=r"trainer\.callbacks: expected no average of the weights"):
        fit(make_module(), EMAWeightAveraging(decay=DECAY), callback)
