"""A LightningModule of somebody else that calls the hooks: the geometry, its callbacks and checkpoints work in it.

- it trains to the bits of a `GritLitModule` on the same batches, and a loop without a Trainer comes to the same;
- a run that is stopped inside a window and resumed is the run that never stopped, to the bit;
- its checkpoints hold what it trains besides the adapter and nothing of the backbone, and its adapter can be exported;
- a call that is forgotten, and a Trainer or model that cannot be served, is named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from grit_lightning import GeometryConfig, GeometryHooks, GeometrySteps, GritLitModule
from grit_lightning.batches import label_token_count, learnt_labels, model_inputs
from grit_lightning.callbacks import AdapterCheckpoint, RankAdaptation, Reprojection, SpectraLogger
from grit_lightning.datamodules.pipeline.resumable import ResumableLoader, ResumableSampler
from grit_lightning.export import export_adapter
from grit_lightning.optimizers import EigenbasisAdam

Batch = dict[str, Tensor]
SETTINGS = GeometryConfig(kfac_update_freq=2, kfac_min_samples=1, curvature_penalty=1e-3)
OPTIMIZERS = {"adamw": torch.optim.AdamW, "eigenbasis": EigenbasisAdam}
ACCEPTED = frozenset({"position_ids"})
LOADED = frozenset({"state_dict", "optimizer_states", "grit", "callbacks", "lr_schedulers"})


class Own(pl.LightningModule):
    """Adapter, loss and optimizer of its own; `forget` leaves out the call in one of its hooks."""

    def __init__(self, model: PeftModel, optimizer: str = "adamw", forget: str = "", head: bool = False) -> None:
        super().__init__()
        self.model = model
        self.hooks = GeometryHooks(self, model, SETTINGS)
        self.geometry = self.hooks.geometry
        self.head = nn.Linear(2, 1) if head else None  # made after the hooks
        self.optimizer, self.forget = OPTIMIZERS[optimizer], forget

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        return optimizer if self.forget == "connect" else self.hooks.connect(optimizer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.forget != "start_micro_batch":
            self.hooks.start_micro_batch(batch["attention_mask"], label_token_count(learnt_labels(batch)))
        loss = self.model(**model_inputs(batch, ACCEPTED), use_cache=False).loss
        if self.head is not None:
            loss = loss + self.head(torch.ones(2)).square().sum()
        return loss if self.forget == "take_loss" else self.hooks.take_loss(loss)

    def on_after_backward(self) -> None:
        if self.forget != "on_after_backward":
            self.hooks.on_after_backward()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.forget != "on_before_optimizer_step":
            self.hooks.on_before_optimizer_step(optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.hooks.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.forget != "on_load_checkpoint":
            self.hooks.on_load_checkpoint(checkpoint)

    def on_train_start(self) -> None:
        self.hooks.on_train_start()


@pytest.fixture
def adapted(make_tiny_llama: Callable[..., Any], lora_config: Callable[..., Any]) -> Callable[..., PeftModel]:
    def make(**lora: Any) -> PeftModel:
        torch.manual_seed(3)
        return get_peft_model(make_tiny_llama(num_hidden_layers=1), lora_config(**lora)).train()

    return make


@pytest.fixture
def batches(random_batch: Callable[..., Batch]) -> list[Batch]:
    return [random_batch(batch=2, length=10, pad=[0, seed % 4], prompt=2, seed=seed) for seed in range(8)]


def events() -> list[pl.Callback]:
    return [
        Reprojection("balanced", every_n_steps=2),
        RankAdaptation(every_n_steps=2, threshold=0.9, min_rank=1, mixing_probability=0.5),
        SpectraLogger(every_n_steps=1),
    ]


def trainer(folder: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 1,
        "enable_checkpointing": any(isinstance(callback, AdapterCheckpoint) for callback in callbacks),
    }
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **(quiet | defaults | settings))


def loader(batches: list[Batch]) -> ResumableLoader:
    sampler = ResumableSampler(batches, num_replicas=1, rank=0, shuffle=True, seed=5)
    own = torch.Generator().manual_seed(0)  # leaves the global random stream to dropout
    return ResumableLoader(batches, 1, sampler=sampler, collate_fn=lambda rows: rows[0], generator=own)


def fit(
    module: pl.LightningModule, batches: list[Batch], folder: Path, *callbacks: pl.Callback, **settings: Any
) -> Any:
    run = trainer(folder, *callbacks, **settings)
    run.fit(module, loader(batches))
    return module


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in (key, *leaves(value[key]))]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value.tolist() if isinstance(value, Tensor) else value]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_trains_to_the_bits_of_a_grit_lit_module(
    adapted: Any, make_tiny_llama: Any, lora_config: Any, batches: list[Batch], tmp_path: Path, optimizer: str
) -> None:
    own = fit(Own(adapted(), optimizer), batches, tmp_path, *events())
    torch.manual_seed(3)
    factory = lambda parameters: OPTIMIZERS[optimizer](parameters, lr=1e-2)  # noqa: E731
    backbone = make_tiny_llama(num_hidden_layers=1)
    ours = GritLitModule(backbone, lora_config(), SETTINGS, optimizer=factory, lr_scheduler=None)
    ours.configure_model()
    fit(ours, batches, tmp_path, *events())
    assert min(own.geometry.ranks.values()) < 4
    assert leaves(own.geometry.state_dict()) == leaves(ours.geometry.state_dict())
    assert leaves(trained(own)) == leaves(trained(ours))


def test_a_loop_without_a_trainer_comes_to_the_same(adapted: Any, batches: list[Batch], tmp_path: Path) -> None:
    own = Own(adapted(), "eigenbasis")
    run = trainer(tmp_path)
    run.fit(own, torch.utils.data.DataLoader(batches, batch_size=None))
    model = adapted()
    steps = GeometrySteps(model, SETTINGS)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = steps.connect(EigenbasisAdam(parameters, lr=1e-2))
    for number, batch in enumerate(batches):
        steps.start_micro_batch(batch["attention_mask"], label_token_count(learnt_labels(batch)), accumulate=2)
        loss = steps.take_loss(model(**model_inputs(batch, ACCEPTED), use_cache=False).loss)
        (loss / 2).backward()
        steps.finish_micro_batch()
        if number % 2:
            steps.before_optimizer_step(accumulate=2)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert leaves(trained(model)) == leaves(trained(own.model))
    assert leaves(steps.geometry.state_dict()) == leaves(own.geometry.state_dict())


class Stopped(Exception):  # noqa: N818 (it is no error)
    pass


class SaveAndStop(pl.Callback):
    def __init__(self, path: Path, micro_batches: int) -> None:
        self.path, self.micro_batches = path, micro_batches

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.micro_batches:
            trainer.save_checkpoint(self.path)
            raise Stopped


@pytest.mark.parametrize("micro_batches", [4, 5], ids=["after an event", "inside a window"])
def test_a_run_stopped_and_resumed_is_the_same_to_the_bit(
    adapted: Any, batches: list[Batch], tmp_path: Path, micro_batches: int
) -> None:
    def module() -> Own:
        return Own(adapted(lora_dropout=0.2), "eigenbasis", head=True)

    def last(name: str) -> Any:
        content = torch.load(tmp_path / name / "last.ckpt", weights_only=True)
        del content["callbacks"]["AdapterCheckpoint"]
        return leaves({key: content[key] for key in LOADED & content.keys()})

    pl.seed_everything(7, verbose=False)
    fit(module(), batches, tmp_path, *events(), AdapterCheckpoint(tmp_path / "whole", every_n_steps=4))
    pl.seed_everything(7, verbose=False)
    with pytest.raises(Stopped):
        fit(module(), batches, tmp_path, *events(), SaveAndStop(tmp_path / "stopped.ckpt", micro_batches))
    pl.seed_everything(99, verbose=False)
    resumed = trainer(tmp_path, *events(), AdapterCheckpoint(tmp_path / "resumed", every_n_steps=4))
    resumed.fit(module(), loader(batches), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)
    assert last("whole") == last("resumed")


def test_a_checkpoint_holds_what_is_trained_and_no_backbone_and_loads_strictly(
    adapted: Any, batches: list[Batch], tmp_path: Path
) -> None:
    module = fit(Own(adapted(), head=True), batches, tmp_path, *events())
    module.trainer.save_checkpoint(tmp_path / "own.ckpt")
    content = torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert content["state_dict"].keys() == trained(module).keys()
    assert "head.weight" in content["state_dict"]
    loaded = Own.load_from_checkpoint(tmp_path / "own.ckpt", model=adapted(), head=True, weights_only=True)
    assert leaves(trained(loaded)) == leaves(trained(module))
    assert loaded.geometry.ranks == module.geometry.ranks
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.weight"):
        loaded.load_state_dict({name: value for name, value in trained(module).items() if "head" not in name})


@pytest.mark.parametrize("source", ["checkpoint", "hooks", "steps"])
def test_its_adapter_is_exported_for_plain_peft(
    adapted: Any, make_tiny_llama: Any, batches: list[Batch], tmp_path: Path, source: str
) -> None:
    module = fit(Own(adapted(), head=True), batches, tmp_path, *events())
    module.trainer.save_checkpoint(tmp_path / "own.ckpt")
    sources = {"checkpoint": tmp_path / "own.ckpt", "hooks": module.hooks, "steps": module.hooks.steps}
    exported = export_adapter(sources[source], tmp_path / "adapter")
    assert exported.parameters == module.geometry.effective_parameters < exported.parameters_before
    plain = PeftModel.from_pretrained(make_tiny_llama(num_hidden_layers=1), tmp_path / "adapter")
    ids = batches[0]["input_ids"]
    torch.testing.assert_close(plain(ids).logits, module.model.eval()(ids).logits, rtol=0, atol=1e-5)


def test_a_checkpoint_of_another_backbone_is_refused_before_anything_is_loaded(
    adapted: Any, make_tiny_llama: Any, lora_config: Any, batches: list[Batch], tmp_path: Path
) -> None:
    fit(Own(adapted()), batches, tmp_path).trainer.save_checkpoint(tmp_path / "own.ckpt")
    other = Own(get_peft_model(make_tiny_llama(num_hidden_layers=2), lora_config()))
    before = leaves(trained(other))
    with pytest.raises(ValueError, match="another backbone: num_hidden_layers 1 → 2"):
        trainer(tmp_path).fit(other, loader(batches), ckpt_path=tmp_path / "own.ckpt", weights_only=True)
    assert leaves(trained(other)) == before


# What is forgotten.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("connect", r"configure_optimizers: expected .* connect\(\)"),
        ("start_micro_batch", "take_loss: expected start_micro_batch before"),
        ("take_loss", "got 0 losses and 2 backward passes. Call take_loss"),
        ("on_after_backward", "got 2 losses and 0 backward passes. Call .*on_after_backward"),
        ("on_before_optimizer_step", "expected before_optimizer_step .*on_before_optimizer_step"),
    ],
)
def test_a_forgotten_call_is_named_at_the_first_step(
    adapted: Any, batches: list[Batch], tmp_path: Path, call: str, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        fit(Own(adapted(), forget=call), batches, tmp_path)


def test_a_resume_that_the_hooks_are_not_told_of_is_named(adapted: Any, batches: list[Batch], tmp_path: Path) -> None:
    fit(Own(adapted()), batches, tmp_path).trainer.save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(RuntimeError, match=r"Own\.on_load_checkpoint: expected .* begin anew"):
        trainer(tmp_path, max_epochs=2).fit(
            Own(adapted(), forget="on_load_checkpoint"),
            loader(batches),
            ckpt_path=tmp_path / "own.ckpt",
            weights_only=True,
        )


@pytest.mark.parametrize(
    "callback", [Reprojection(), RankAdaptation(), SpectraLogger()], ids=lambda c: type(c).__name__
)
def test_a_geometry_that_callbacks_cannot_find_is_named(
    adapted: Any, batches: list[Batch], tmp_path: Path, callback: pl.Callback
) -> None:
    module = Own(adapted())
    del module.geometry
    with pytest.raises(MisconfigurationException, match="the attribute `geometry` to that of its GeometryHooks"):
        fit(module, batches, tmp_path, callback)


# What cannot be served.


def test_manual_optimization_is_refused(adapted: Any, batches: list[Batch], tmp_path: Path) -> None:
    module = Own(adapted())
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=r"Own\.automatic_optimization: expected True"):
        fit(module, batches, tmp_path, accumulate_grad_batches=1, gradient_clip_val=None)


def test_an_optimizer_that_needs_a_geometry_is_refused_without_one(adapted: Any) -> None:
    model = adapted()
    optimizer = EigenbasisAdam(p for p in model.parameters() if p.requires_grad)
    with pytest.raises(
        MisconfigurationException, match=r"model\.geometry: expected a GeometryConfig, which EigenbasisAdam"
    ):
        GeometrySteps(model, None).connect(optimizer)


def test_silent_layers_are_left_out_only_by_whoever_looks_for_them(adapted: Any, batches: list[Batch]) -> None:
    model = adapted()
    steps = GeometrySteps(model, GeometryConfig(silent_layers="leave_out"))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"GeometryConfig\.silent_layers: expected refuse .* Call settle_layers"):
        steps.connect(optimizer)
    batch = {name: value[:1] for name, value in batches[0].items()}
    steps.settle_layers(lambda: model(**batch).loss, batch["input_ids"].numel())
    assert steps.connect(optimizer) is optimizer


def test_an_optimizer_step_without_an_optimizer_is_refused(adapted: Any) -> None:
    with pytest.raises(RuntimeError, match=r"before_optimizer_step: expected an optimizer, got none\. Call connect"):
        GeometrySteps(adapted()).before_optimizer_step()


def test_a_model_without_peft_is_refused(make_tiny_llama: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a peft\.PeftModel, got a LlamaForCausalLM"):
        GeometrySteps(make_tiny_llama())


def test_an_adapter_of_another_name_is_refused(make_tiny_llama: Any, lora_config: Any) -> None:
    with pytest.raises(ValueError, match=r"model: expected .* the name 'default', got \['mine'\]"):
        GeometrySteps(get_peft_model(make_tiny_llama(), lora_config(), adapter_name="mine"))


def test_a_start_that_may_have_replaced_the_backbone_is_refused(adapted: Any) -> None:
    model = adapted()
    model.peft_config["default"].init_lora_weights = "corda"
    with pytest.raises(ValueError, match=r"adapter\.init_lora_weights: expected .* got 'corda'"):
        GeometrySteps(model)


def test_a_model_that_is_no_attribute_of_the_module_is_refused_before_a_checkpoint(
    adapted: Any, batches: list[Batch], tmp_path: Path
) -> None:
    module, model = Own(adapted()), adapted()
    module.hooks = GeometryHooks(module, model, SETTINGS)
    with pytest.raises(ValueError, match=r"model: expected an attribute of the Own"):
        module.hooks.on_save_checkpoint({})
