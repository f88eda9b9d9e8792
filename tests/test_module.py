"""GritLitModule under a real Trainer: equivalences, checkpoints, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import OFTConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.callbacks import RankAdaptation, Reprojection, SpectraLogger
from grit_lightning.export import export_adapter

Batches = list[dict[str, Tensor]]


def loader(batches: Batches) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None, shuffle=False)


def trainer(tmp_path: Path, **overrides: Any) -> pl.Trainer:
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
    return pl.Trainer(**(settings | overrides))


@pytest.fixture
def batches(random_batch: Callable[..., dict[str, Tensor]]) -> Batches:
    return [random_batch(batch=4, length=12, pad=[0, 2, 5, 1], prompt=2, seed=seed) for seed in range(6)]


@pytest.fixture
def make_module(make_tiny_llama: Callable[..., Any], lora_config: Callable[..., Any]) -> Callable[..., GritLitModule]:
    def make(**overrides: Any) -> GritLitModule:
        settings: dict[str, Any] = {
            "backbone": make_tiny_llama(),
            "adapter": lora_config(),
            "geometry": GeometryConfig(kfac_update_freq=1, kfac_min_samples=1),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            "lr_scheduler": None,
        }
        torch.manual_seed(3)
        return GritLitModule(**(settings | overrides))

    return make


def adapter_of(module: GritLitModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.model.named_parameters() if p.requires_grad}


def fit(module: GritLitModule, batches: Batches, tmp_path: Path, **overrides: Any) -> dict[str, Tensor]:
    pl.seed_everything(11)
    trainer(tmp_path, **overrides).fit(module, loader(batches), loader(batches[:1]))
    return adapter_of(module)


def test_without_geometry_training_is_bit_identical_to_a_plain_peft_loop(
    make_module: Callable[..., Any],
    make_tiny_llama: Callable[..., Any],
    lora_config: Callable[..., Any],
    batches: Batches,
    tmp_path: Path,
) -> None:
    found = fit(make_module(geometry=None), batches, tmp_path)

    pl.seed_everything(11)
    model = get_peft_model(make_tiny_llama(), lora_config())
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_a_run_repeated_with_the_same_seed_is_bit_identical_and_the_geometry_matters(
    make_module: Callable[..., Any], batches: Batches, tmp_path: Path
) -> None:
    def everything() -> list[Callback]:
        return [Reprojection(every_n_steps=2), RankAdaptation(every_n_steps=3, threshold=0.9, min_rank=1)]

    first = fit(make_module(), batches, tmp_path, callbacks=everything())
    second = fit(make_module(), batches, tmp_path, callbacks=everything())
    plain = fit(make_module(geometry=None), batches, tmp_path)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert any(not torch.equal(value, plain[name]) for name, value in first.items())


@pytest.mark.parametrize("size", [2, 1])
def test_accumulated_micro_batches_give_the_statistics_of_the_whole_batch(
    make_module: Callable[..., Any], random_batch: Callable[..., Any], tmp_path: Path, size: int
) -> None:
    batch = random_batch(batch=4, length=12, pad=3, prompt=2)  # equal label counts: the mean of means is the mean
    parts = [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, 4, size)]
    whole, split = make_module(), make_module()
    fit(whole, [batch] * 2, tmp_path)
    fit(split, parts * 2, tmp_path, accumulate_grad_batches=len(parts))
    for name, view in whole.geometry.layers.items():
        other = split.geometry.layers[name]
        assert view.n_samples == other.n_samples == 2 * int(batch["attention_mask"].sum())
        torch.testing.assert_close(other.a_cov, view.a_cov, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(other.g_cov, view.g_cov, rtol=1e-2, atol=1e-3 * float(view.g_cov.abs().max()))
        assert float(view.g_cov.abs().max()) > 0


def test_the_last_partial_window_has_gradients_of_full_size(
    make_module: Callable[..., Any], random_batch: Callable[..., Any], tmp_path: Path
) -> None:
    norms: list[float] = []

    module = make_module(geometry=None, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    module.configure_gradient_clipping = lambda *args, **kwargs: norms.append(
        float(torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm())
    )
    fit(module, [random_batch()] * 3, tmp_path, accumulate_grad_batches=2)
    assert len(norms) == 2
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_preconditioning_happens_before_clipping(
    make_module: Callable[..., Any], batches: Batches, tmp_path: Path
) -> None:
    norms: list[float] = []

    class AfterClipping(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            norms.append(float(torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).norm()))

    geometry = GeometryConfig(kfac_update_freq=1, kfac_min_samples=1, grafting=False, damping_mode="absolute")
    module = make_module(geometry=geometry, optimizer=lambda parameters: AfterClipping(parameters, lr=1.0))
    fit(module, batches, tmp_path, gradient_clip_val=1e-3)
    assert all(norm <= 1e-3 * (1 + 1e-4) for norm in norms)


def test_checkpoints_hold_the_adapter_only_and_restore_geometry_and_ranks(
    make_module: Callable[..., Any], make_tiny_llama: Callable[..., Any], batches: Batches, tmp_path: Path
) -> None:
    module = make_module()
    run = trainer(tmp_path, callbacks=[RankAdaptation(every_n_steps=3, threshold=0.6, min_rank=1)])
    run.fit(module, loader(batches), loader(batches[:1]))
    path = tmp_path / "run.ckpt"
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert set(saved["state_dict"]) == {f"model.{name}" for name in adapter_of(module)}
    assert min(module.geometry.ranks.values()) < 4

    restored = GritLitModule.load_from_checkpoint(path, backbone=make_tiny_llama(), weights_only=True)
    for name, value in adapter_of(restored).items():
        assert torch.equal(value, adapter_of(module)[name])
    assert restored.geometry.ranks == module.geometry.ranks
    for name, view in restored.geometry.layers.items():
        assert torch.equal(view.g_cov, module.geometry.layers[name].g_cov)


def test_a_checkpoint_of_another_adapter_is_refused(
    make_module: Callable[..., Any], lora_config: Callable[..., Any], batches: Batches, tmp_path: Path
) -> None:
    run = trainer(tmp_path)
    run.fit(make_module(), loader(batches), loader(batches[:1]))
    run.save_checkpoint(tmp_path / "run.ckpt")
    other = make_module(adapter=lora_config(r=8))
    with pytest.raises(ValueError, match="another adapter configuration"):
        trainer(tmp_path, max_epochs=2).fit(
            other, loader(batches), loader(batches[:1]), ckpt_path=tmp_path / "run.ckpt", weights_only=True
        )


def callbacks_in_every_combination() -> Iterator[list[str]]:
    names = ["reprojection", "rank", "spectra"]
    for mask in range(1, 8):
        yield [name for bit, name in enumerate(names) if mask >> bit & 1]


@pytest.mark.filterwarnings("ignore:You are trying to .self.log")
@pytest.mark.parametrize("names", list(callbacks_in_every_combination()), ids="+".join)
@pytest.mark.parametrize("setting", [{}, {"fast_dev_run": True}, {"barebones": True}], ids=["full", "dev", "barebones"])
def test_callbacks_work_alone_and_together(
    make_module: Callable[..., Any], batches: Batches, tmp_path: Path, names: list[str], setting: dict[str, Any]
) -> None:
    available: dict[str, Callback] = {
        "reprojection": Reprojection(every_n_steps=1, k=None if "rank" in names else 2),
        "rank": RankAdaptation(every_n_steps=1, threshold=0.5, min_rank=1),
        "spectra": SpectraLogger(every_n_steps=1),
    }
    if "barebones" in setting:
        setting = setting | {"enable_checkpointing": False, "logger": False}
    module = make_module()
    run = trainer(tmp_path, callbacks=[available[name] for name in names], **setting)
    run.fit(module, loader(batches), loader(batches[:1]))
    reduced = {"reprojection", "rank"} & set(names)
    assert (module.geometry.mean_rank < 4) == bool(reduced)
    for view in module.geometry:  # the rank is real: B has no other columns, even after further AdamW steps
        site = view.group.sites[view.index]
        assert bool((site.up.weight[:, view.rank :] == 0).all())
        assert torch.linalg.matrix_rank(site.up.weight @ site.down.weight) <= view.rank
    if "spectra" in names and not setting:
        assert run.callback_metrics["grit/rank"] <= 4


def test_order_of_callbacks_does_not_change_the_ranks(
    make_module: Callable[..., Any], batches: Batches, tmp_path: Path
) -> None:
    ranks = []
    for order in (1, -1):
        callbacks = [Reprojection(every_n_steps=3), RankAdaptation(every_n_steps=3, threshold=0.7, min_rank=1)][::order]
        module = make_module()
        fit(module, batches, tmp_path, callbacks=callbacks)
        ranks.append(module.geometry.ranks)
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize(
    "callback", [Reprojection(), RankAdaptation(), SpectraLogger()], ids=lambda c: type(c).__name__
)
def test_a_callback_without_geometry_says_what_to_change(
    make_module: Callable[..., Any], batches: Batches, tmp_path: Path, callback: Callback
) -> None:
    with pytest.raises(MisconfigurationException, match=rf"{type(callback).__name__}: expected .*model\.geometry"):
        trainer(tmp_path, callbacks=[callback]).fit(make_module(geometry=None), loader(batches), loader(batches[:1]))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: Reprojection(mode="sideways"), "mode: expected one_sided"),
        (lambda: Reprojection(k=0), "k: expected an integer ≥ 1"),
        (lambda: Reprojection(blend=0.0), r"blend: expected a number in \(0, 1\]"),
        (lambda: Reprojection(every_n_steps=0), "every_n_steps: expected an integer ≥ 1"),
        (lambda: RankAdaptation(threshold=0.0), r"threshold \(τ\): expected a number in \(0, 1\]"),
        (lambda: RankAdaptation(threshold=1.1), r"threshold \(τ\): expected a number in \(0, 1\]"),
        (lambda: RankAdaptation(min_rank=0), "min_rank"),
        (lambda: SpectraLogger(energy=2.0), "energy"),
    ],
)
def test_bad_callback_settings_are_named(callback: Callable[[], Callback], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        callback()


def test_a_k_beyond_the_adapter_rank_is_refused(
    make_module: Callable[..., Any], batches: Batches, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"reprojection_k.*: expected at most the adapter's rank 4, got 8"):
        trainer(tmp_path, callbacks=[Reprojection(k=8)]).fit(make_module(), loader(batches), loader(batches[:1]))
    with pytest.raises(ValueError, match="min_rank: expected at most the adapter's rank 4, got 8"):
        trainer(tmp_path, callbacks=[RankAdaptation(min_rank=8)]).fit(
            make_module(), loader(batches), loader(batches[:1])
        )


def test_a_non_finite_loss_stops_before_the_weights_change(
    make_module: Callable[..., Any], batches: Batches, tmp_path: Path
) -> None:
    module = make_module()
    module.configure_model()
    before = adapter_of(module)
    module.model.get_base_model().lm_head.weight[7, 7] = float("nan")
    with pytest.raises(FloatingPointError, match=r"Optimizer step 0: expected a finite training loss, got \[nan\]"):
        fit(module, batches, tmp_path)
    for name, value in adapter_of(module).items():
        assert torch.equal(value, before[name])


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(
    make_module: Callable[..., Any], batches: Batches, tmp_path: Path
) -> None:
    module = make_module(geometry=None)
    module.configure_model()
    before = adapter_of(module)
    next(p for p in module.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FloatingPointError, match=r"expected a finite gradient, got one that is not, at a loss of \[\d"):
        fit(module, batches, tmp_path)
    for name, value in adapter_of(module).items():
        assert torch.equal(value, before[name])


def test_a_step_without_any_label_token_is_refused(
    make_module: Callable[..., Any], batches: Batches, tmp_path: Path
) -> None:
    batches[0]["labels"][:] = -100
    with pytest.raises(
        ValueError, match="Optimizer step 0: expected a label token in at least one of 1 micro-batches, got none"
    ):
        fit(make_module(), batches, tmp_path)


def test_a_micro_batch_without_label_tokens_counts_as_one_without_a_gradient(
    make_module: Callable[..., Any], batches: Batches, tmp_path: Path
) -> None:
    silent = {**batches[1], "labels": torch.full_like(batches[1]["labels"], -100)}
    module, alone = make_module(), make_module()
    fit(module, [silent, batches[0]], tmp_path, accumulate_grad_batches=2)
    fit(alone, [batches[0]], tmp_path)
    for name, view in module.geometry.layers.items():
        one = alone.geometry.layers[name]
        assert view.n_samples == sum(int(batch["attention_mask"].sum()) for batch in (silent, batches[0]))
        torch.testing.assert_close(view.g_cov * view.n_samples, one.g_cov * one.n_samples)
        assert torch.all(torch.linalg.eigvalsh(view.a_cov * view.n_samples - one.a_cov * one.n_samples) > -1e-4)


def test_a_sequence_longer_than_the_context_is_refused(
    make_module: Callable[..., Any], random_batch: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"at most 128 tokens, .* got 129 for a sequence\. Lower data\.max_length"):
        fit(make_module(), [random_batch(length=129)], tmp_path)


def test_the_default_schedule_warms_up_and_ends_at_zero(
    make_module: Callable[..., Any], batches: Batches, tmp_path: Path
) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    fit(make_module(lr_scheduler="cosine", warmup_fraction=0.2), batches * 2, tmp_path, callbacks=[Rates()])
    assert len(rates) == 12
    assert rates[0] == 0.0
    assert max(rates) == rates[2] == 1e-2
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 1e-3


def test_left_padding_changes_neither_loss_nor_statistics(
    make_module: Callable[..., Any], random_batch: Callable[..., Any], tmp_path: Path
) -> None:
    right = random_batch(batch=4, length=12, pad=[0, 2, 5, 1], prompt=2)
    left = {
        key: torch.stack([row.roll(n) for row, n in zip(value, [0, 2, 5, 1], strict=True)])
        for key, value in right.items()
    }
    modules = [make_module(), make_module()]
    for module, batch in zip(modules, (right, left), strict=True):
        fit(module, [batch] * 3, tmp_path)
    for name, view in modules[0].geometry.layers.items():
        other = modules[1].geometry.layers[name]
        torch.testing.assert_close(other.a_cov, view.a_cov, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(other.g_cov, view.g_cov, rtol=1e-2, atol=1e-4 * float(view.g_cov.abs().max()))


def test_trimmed_logits_give_the_same_losses_gradients_and_statistics(
    make_module: Callable[..., Any], random_batch: Callable[..., Any], tmp_path: Path
) -> None:
    batch = random_batch(batch=4, length=12, pad=[0, 2, 5, 1], prompt=4)
    modules = [make_module(trim_logits=trim) for trim in (False, True)]
    for module in modules:
        fit(module, [batch] * 3, tmp_path)
        logits = module(batch, trim=True).logits
        assert logits.shape[1] == 9  # from the position before the first label
        torch.testing.assert_close(logits, module(batch).logits[:, 3:], rtol=1e-4, atol=1e-5)
    for name, value in adapter_of(modules[0]).items():
        torch.testing.assert_close(adapter_of(modules[1])[name], value, rtol=1e-3, atol=1e-5)
    for name, view in modules[0].geometry.layers.items():
        torch.testing.assert_close(modules[1].geometry.layers[name].a_cov, view.a_cov, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*`past_key_values`.*:FutureWarning")  # transformers has renamed it, PEFT has not
@pytest.mark.parametrize(
    "adapter",
    [
        PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        OFTConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
def test_other_peft_methods_train_and_are_evaluated_alike_on_any_padding(
    make_module: Callable[..., Any], random_batch: Callable[..., Any], tmp_path: Path, adapter: Any
) -> None:
    right = random_batch(batch=4, length=12, pad=[0, 2, 5, 1], prompt=2)
    left = {
        key: torch.stack([row.roll(n) for row, n in zip(value, [0, 2, 5, 1], strict=True)])
        for key, value in right.items()
    }
    module = make_module(geometry=None, adapter=adapter)
    module.configure_model()
    before = adapter_of(module)
    fit(module, [right] * 2, tmp_path)
    assert all(not torch.equal(value, before[name]) for name, value in adapter_of(module).items())
    losses = [
        trainer(tmp_path).validate(module, loader([batch]), verbose=False)[0]["val/loss"] for batch in (right, left)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*`past_key_values`.*:FutureWarning")
def test_packed_documents_would_see_each_other_behind_a_prefix(
    make_module: Callable[..., Any], random_batch: Callable[..., Any], tmp_path: Path
) -> None:
    batch = random_batch(batch=2, length=12)
    batch["position_ids"] = torch.arange(6).repeat(2, 2)
    module = make_module(geometry=None, adapter=PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"Packed documents: .* got PrefixTuningConfig\. Set data\.packing to false"):
        fit(module, [batch], tmp_path)


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
def test_a_trained_lora_bias_is_in_the_checkpoint(
    make_module: Callable[..., Any], make_tiny_llama: Any, lora_config: Any, batches: Batches, tmp_path: Path
) -> None:
    module, run = make_module(adapter=lora_config(lora_bias=True)), trainer(tmp_path)
    run.fit(module, loader(batches), loader(batches[:1]))
    run.save_checkpoint(tmp_path / "run.ckpt")
    restored = GritLitModule.load_from_checkpoint(tmp_path / "run.ckpt", backbone=make_tiny_llama(), weights_only=True)
    trained = adapter_of(module)
    assert sum(name.endswith(".bias") and bool(value.any()) for name, value in trained.items()) == 4
    assert all(torch.equal(value, trained[name]) for name, value in adapter_of(restored).items())


@pytest.mark.parametrize("geometry", [None, GeometryConfig(kfac_update_freq=1, kfac_min_samples=1)])
def test_the_configuration_of_an_exported_adapter_trains_anew(
    make_module: Callable[..., Any],
    lora_config: Callable[..., Any],
    batches: Batches,
    tmp_path: Path,
    geometry: GeometryConfig | None,
) -> None:
    module = make_module(adapter=lora_config(rank_pattern={"v_proj": 2}))
    fit(module, batches, tmp_path)
    export_adapter(module, tmp_path / "adapter")
    exported = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert exported["inference_mode"]
    assert exported["rank_pattern"]
    again = make_module(adapter=exported, geometry=geometry)
    again.configure_model()
    before = adapter_of(again)
    found = fit(again, batches, tmp_path)
    assert sum(value.numel() for value in found.values()) == module.geometry.effective_parameters
    assert all(not torch.equal(value, before[name]) for name, value in found.items())
