"""Which layers can be heard: found out before training, without a trace, and left out or refused as the settings say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import MixtralConfig, MixtralForCausalLM

from grit_lightning import GeometryConfig, GritLitModule, RankSpaceGeometry
from grit_lightning.distributed.strategies import GritFSDPStrategy
from grit_lightning.export.compaction import compact
from grit_lightning.export.peft_names import named_by_peft
from grit_lightning.geometry.audibility import PROBE_TOKENS, probe_token_ids, silent_layers
from grit_lightning.geometry.sites import find_lora_sites

PREFIX = "base_model.model.model.layers.0."


class Routed(nn.Module):
    """A router, and four experts of which every token sees one; `unused` never runs, `ignored` has no say in the output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 4, bias=False)
        self.expert = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.unused = nn.Linear(width, width)
        self.ignored = nn.Linear(width, width)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        flat = x.flatten(0, -2)
        self.ignored(flat)
        weight = self.router(flat).softmax(-1)
        chosen = torch.arange(len(flat), device=x.device) % 4
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.expert):
            rows = (chosen == number).nonzero().flatten()
            out = out.index_add(0, rows, expert(flat[rows]) * weight[rows, number : number + 1])
        return out.view_as(x)


TARGETS = ["q_proj", "router", "unused", "ignored", "expert.0", "expert.1", "expert.2", "expert.3"]
SILENT = {
    **{f"{PREFIX}mlp.expert.{number}": "sees only some of the tokens" for number in range(4)},
    f"{PREFIX}mlp.unused": "never runs its lora_A",
    f"{PREFIX}mlp.ignored": "takes no part in the loss",
}


@pytest.fixture
def routed_llama(make_tiny_llama: Callable[..., Any]) -> Callable[[], Any]:
    """A factory of one-layer Llamas with routed experts and dropout."""

    def make() -> Any:
        model = make_tiny_llama(num_hidden_layers=1, attention_dropout=0.5)
        torch.manual_seed(1)
        model.model.layers[0].mlp = Routed(32)
        return model

    return make


@pytest.fixture
def module(routed_llama: Callable[[], Any], lora_config: Callable[..., Any]) -> Callable[..., GritLitModule]:
    def make(silent: Any, targets: Any = tuple(TARGETS), **settings: Any) -> GritLitModule:
        config = GeometryConfig(kfac_update_freq=1, kfac_min_samples=1, silent_layers=silent)
        torch.manual_seed(2)
        return GritLitModule(routed_llama(), lora_config(target_modules=list(targets)), config, **settings)

    return make


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def make(**overrides: Any) -> pl.Trainer:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        return pl.Trainer(
            **(
                {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": tmp_path, "num_sanity_val_steps": 0}
                | quiet
                | overrides
            )
        )

    return make


@pytest.fixture
def loader(random_batch: Callable[..., dict[str, Tensor]]) -> DataLoader[Any]:
    return DataLoader([random_batch(seed=seed) for seed in range(3)], batch_size=None)  # type: ignore[arg-type]


def listen(model: PeftModel) -> dict[str, str]:
    ids = probe_token_ids(model, torch.device("cpu"))
    return silent_layers(model, find_lora_sites(model), lambda: model(input_ids=ids, labels=ids).loss, ids.numel())


def test_every_kind_of_silent_layer_is_found(
    routed_llama: Callable[[], Any], lora_config: Callable[..., Any], randomize: Callable[..., Any]
) -> None:
    model = get_peft_model(routed_llama(), lora_config(target_modules=TARGETS))
    assert listen(model) == SILENT  # B is zero: gradients that are there count, whatever their size
    assert listen(randomize(model)) == SILENT


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys"
)  # PEFT's own, of its conversion of experts
def test_experts_that_are_no_linear_layers_are_found(lora_config: Callable[..., Any]) -> None:
    config = MixtralConfig(
        **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    )
    model = get_peft_model(MixtralForCausalLM(config), lora_config(target_modules="all-linear"))
    silent = {name.removeprefix(PREFIX) for name in listen(model)}
    assert silent >= {"mlp.gate", "mlp.experts"}
    assert not any("self_attn" in name for name in silent)


@pytest.mark.parametrize("training", [True, False])
def test_listening_leaves_no_trace(
    routed_llama: Callable[[], Any], lora_config: Callable[..., Any], training: bool
) -> None:
    model = get_peft_model(routed_llama(), lora_config(target_modules=TARGETS, lora_dropout=0.5)).train(training)
    model.get_base_model().lm_head.eval()  # a mode of its own
    geometry = RankSpaceGeometry(model, GeometryConfig())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    kept = next(p for p in model.parameters() if p.requires_grad)
    kept.grad = torch.ones_like(kept)
    random_numbers = torch.get_rng_state()
    listen(model)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert [p for p in model.parameters() if p.grad is not None] == [kept]
    assert bool((kept.grad == 1).all())
    assert float(model.get_base_model().model.layers[0].mlp.runs) == 0
    for group in geometry.groups:
        assert group.calls == [0] * len(group.sites)
        assert not any(bool(part.any()) for part in group.statistics.micro.tensors())


def test_probe_tokens_fit_a_short_context_and_a_small_vocabulary(make_tiny_llama: Callable[..., Any]) -> None:
    ids = probe_token_ids(make_tiny_llama(), torch.device("cpu"))
    assert ids.shape == (1, PROBE_TOKENS)
    assert len(set(ids.flatten().tolist())) == PROBE_TOKENS
    assert int(ids.max()) < 160
    assert probe_token_ids(make_tiny_llama(max_position_embeddings=4), torch.device("cpu")).shape == (1, 4)
    assert int(probe_token_ids(make_tiny_llama(vocab_size=10), torch.device("cpu")).max()) < 10


def test_silent_layers_are_refused_before_the_first_step(
    module: Callable[..., Any], trainer: Callable[..., Any], loader: Any
) -> None:
    run = trainer()
    with pytest.raises(
        ValueError, match=r"adapter\.target_modules: .* got 6 of 8 .*silent_layers to leave_out"
    ) as error:
        run.fit(module("refuse"), loader, loader)
    assert run.global_step == 0
    assert all(f"{name} {fault}" in str(error.value) for name, fault in SILENT.items())


def test_silent_layers_that_are_left_out_are_named_once_and_trained_as_a_plain_adapter(
    module: Callable[..., Any], trainer: Callable[..., Any], loader: Any
) -> None:
    given = module("leave_out", lr_scheduler=None)
    with pytest.warns(UserWarning, match=r"silent_layers: left 6 of 8 adapted layers out") as caught:
        trainer().fit(given, loader, loader)
    assert len([w for w in caught if "silent_layers" in str(w.message)]) == 1
    assert sorted(given.geometry.layers) == [f"{PREFIX}mlp.router", f"{PREFIX}self_attn.q_proj"]
    assert sorted(site.name for site in given.geometry.left_out) == sorted(SILENT)
    experts = [site for site in given.geometry.left_out if "expert" in site.name]
    assert all(bool(site.up.weight.any()) for site in experts)  # trained
    (optimizer,) = given.trainer.optimizers
    assert all("basis" not in optimizer.state[site.up.weight] for site in experts)  # by AdamW
    exported = compact(given.adapter_config, named_by_peft(given.peft_model))
    assert given.geometry.effective_parameters == exported.parameters


def test_a_sharded_backbone_cannot_leave_layers_out(module: Callable[..., Any]) -> None:
    given = module("leave_out")
    given.configure_model()
    given._trainer = SimpleNamespace(strategy=GritFSDPStrategy.__new__(GritFSDPStrategy))
    with pytest.raises(ValueError, match=r"silent_layers: expected refuse with a sharded backbone"):
        given.configure_optimizers()


def test_a_model_of_silent_layers_is_refused_whatever_the_setting(
    module: Callable[..., Any], trainer: Callable[..., Any], loader: Any
) -> None:
    with pytest.raises(ValueError, match=r"got 1 of 1 that it cannot: .* set model\.geometry to null"):
        trainer().fit(module("leave_out", ["unused"]), loader, loader)


@pytest.mark.filterwarnings(
    "ignore:model.geometry.silent_layers", "ignore:You're resuming", "ignore:Checkpoint directory"
)
def test_a_run_without_its_silent_layers_resumes_to_the_bit(
    module: Callable[..., Any], trainer: Callable[..., Any], random_batch: Callable[..., Any], tmp_path: Path
) -> None:
    loader: Any = DataLoader([random_batch()] * 3, batch_size=None)  # it begins anew, which must not matter

    class Save(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    whole, resumed = module("leave_out"), module("leave_out")
    trainer(callbacks=[Save()]).fit(whole, loader, loader)
    trainer().fit(resumed, loader, loader, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert resumed.geometry.layers.keys() == whole.geometry.layers.keys()
    for name, view in whole.geometry.layers.items():
        assert torch.equal(view.g_cov, resumed.geometry.layers[name].g_cov)


def test_without_silent_layers_training_keeps_its_bits(
    make_tiny_llama: Callable[..., Any],
    lora_config: Callable[..., Any],
    trainer: Callable[..., Any],
    loader: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for listens in (True, False):
        if not listens:
            monkeypatch.setattr(GritLitModule, "_settle_layers", lambda *_: None)
        torch.manual_seed(4)
        given = GritLitModule(
            make_tiny_llama(), lora_config(lora_dropout=0.3), GeometryConfig(kfac_update_freq=1, kfac_min_samples=1)
        )
        trainer().fit(given, loader, loader)
        found.append(given.state_dict())
    for (name, value), other in zip(found[0].items(), found[1].values(), strict=True):
        assert torch.equal(value, other), name
