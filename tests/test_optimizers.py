"""Optimizers that live in the geometry: against AdamW in rotated coordinates, and under reprojection."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

from grit_lightning import GeometryConfig, GritLitModule, RankSpaceGeometry
from grit_lightning.callbacks import RankAdaptation
from grit_lightning.functional import maps_rule
from grit_lightning.optimizers import EigenbasisAdam, GeometryAdam, NaturalAdam


@pytest.fixture
def model(make_tiny_llama: Callable[..., Any], lora_config: Callable[..., Any]) -> PeftModel:
    return get_peft_model(make_tiny_llama(), lora_config()).double()


def random_spd(layers: int, r: int, seed: int) -> Tensor:
    root = torch.randn(layers, r, r, generator=torch.Generator().manual_seed(seed))
    return root @ root.mT + 0.1 * torch.eye(r)


def with_statistics(model: PeftModel, **config: Any) -> RankSpaceGeometry:
    """A geometry whose covariances are random, as if observed."""
    geometry = RankSpaceGeometry(model, GeometryConfig(**config))
    for group in geometry.groups:
        layers = len(group.sites)
        group.statistics.total.a, group.statistics.total.g = (
            random_spd(layers, group.r, 1),
            random_spd(layers, group.r, 2),
        )
        group.statistics.total.weight = torch.ones(layers)
        group.counts.tokens += 1000
    return geometry


def set_gradients(parameters: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def trained(model: PeftModel) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("rule", [EigenbasisAdam, NaturalAdam])
def test_without_statistics_the_rule_is_adamw(model: PeftModel, rule: type[GeometryAdam]) -> None:
    parameters = trained(model)
    twins = [p.detach().clone().requires_grad_() for p in parameters]
    optimizer = rule(parameters, lr=0.1, weight_decay=0.2)
    optimizer.bind(RankSpaceGeometry(model, GeometryConfig()))
    reference = torch.optim.AdamW(twins, lr=0.1, weight_decay=0.2)
    for seed in range(4):
        set_gradients(parameters, seed)
        set_gradients(twins, seed)
        optimizer.step()
        reference.step()
    for p, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-10, atol=1e-12)


def test_eigenbasis_is_adamw_on_rotated_factors(model: PeftModel) -> None:
    """With fixed bases, training A with EigenbasisAdam is training U_Gᵀ A with AdamW, and B likewise with B U_A."""
    geometry = with_statistics(model)
    parameters = trained(model)
    optimizer = EigenbasisAdam(parameters, lr=0.1, weight_decay=0.2)
    optimizer.bind(geometry)
    geometry.refresh()
    rotations, twins = [], []
    for p in parameters:
        group, side, index = optimizer._where[p]
        cov = (group.statistics.total.g if side == "a" else group.statistics.total.a)[index].double()
        u = torch.linalg.eigh(cov)[1]
        rotations.append((side, u))
        twins.append((u.T @ p if side == "a" else p @ u).detach().requires_grad_())
    reference = torch.optim.AdamW(twins, lr=0.1, weight_decay=0.2)
    for seed in range(4):
        set_gradients(parameters, seed)
        for p, twin, (side, u) in zip(parameters, twins, rotations, strict=True):
            twin.grad = u.T @ p.grad if side == "a" else p.grad @ u
        optimizer.step()
        reference.step()
    for p, twin, (side, u) in zip(parameters, twins, rotations, strict=True):
        torch.testing.assert_close(p, u @ twin if side == "a" else twin @ u.T, rtol=1e-4, atol=1e-5)


def test_moments_follow_a_moving_basis(model: PeftModel) -> None:
    """The momentum, seen in the parameters' own coordinates, is the average of raw gradients whatever the basis does."""
    geometry = with_statistics(model)
    parameters = trained(model)
    optimizer = EigenbasisAdam(parameters, lr=0.0)
    optimizer.bind(geometry)
    expected = [torch.zeros_like(p) for p in parameters]
    for seed in range(3):
        for group in geometry.groups:
            group.statistics.total.a = random_spd(len(group.sites), group.r, 10 + seed)
            group.statistics.total.g = random_spd(len(group.sites), group.r, 20 + seed)
        geometry.refresh()
        set_gradients(parameters, seed)
        optimizer.step()
        expected = [0.9 * m + 0.1 * p.grad for m, p in zip(expected, parameters, strict=True)]
    for p, momentum in zip(parameters, expected, strict=True):
        state, side = optimizer.state[p], optimizer._where[p][1]
        basis = state["basis"].double()
        found = basis @ state["exp_avg"] if side == "a" else state["exp_avg"] @ basis.T
        torch.testing.assert_close(found, momentum, rtol=1e-4, atol=1e-5)
        assert bool((state["exp_avg_sq"] >= 0).all())


def test_natural_steps_along_the_kfac_direction_with_adams_length(model: PeftModel) -> None:
    geometry = with_statistics(model, damping_mode="absolute", kfac_damping=0.1)
    geometry.refresh()
    parameters = trained(model)
    before = [p.detach().clone() for p in parameters]
    optimizer = NaturalAdam(parameters, lr=0.1, weight_decay=0.0)
    optimizer.bind(geometry)
    set_gradients(parameters, 0)
    optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        group, side, index = optimizer._where[p]
        cov = (group.statistics.total.g if side == "a" else group.statistics.total.a)[index].double() + 0.1 * torch.eye(
            group.r
        )
        direction = torch.linalg.solve(cov, p.grad) if side == "a" else torch.linalg.solve(cov, p.grad.T).T
        step = (old - p).detach()
        cosine = (step * direction).sum() / step.norm() / direction.norm()
        assert cosine == pytest.approx(1.0, abs=1e-5)
        assert step.norm() == pytest.approx(0.1 * p.numel() ** 0.5, rel=1e-3)  # Adam's first step has entries ±1


@pytest.mark.parametrize("rule", [EigenbasisAdam, NaturalAdam, torch.optim.AdamW])
def test_the_rank_holds_through_further_steps(model: PeftModel, rule: Any) -> None:
    geometry = with_statistics(model)
    parameters = trained(model)
    optimizer = rule(parameters, lr=0.1)
    if isinstance(optimizer, GeometryAdam):
        optimizer.bind(geometry)
    geometry._steps = geometry.config.kfac_update_freq
    for seed in range(6):
        set_gradients(parameters, seed)
        geometry.step(precondition=not isinstance(optimizer, GeometryAdam))
        optimizer.step()
        if seed == 2:
            for group in geometry.groups:
                group.counts.tokens += 1000
            geometry.reproject(maps_rule("balanced"), dict.fromkeys(geometry.layers, 2), optimizer=optimizer)
    for group in geometry.groups:
        for site in group.sites:
            assert bool((site.up.weight[:, 2:] == 0).all())
            assert torch.linalg.matrix_rank(site.up.weight @ site.down.weight) == 2


@pytest.mark.parametrize("rule", [EigenbasisAdam, NaturalAdam])
@pytest.mark.parametrize("warmup", [3, None])
def test_the_rule_is_adamw_until_the_geometrys_warm_up_ends(
    model: PeftModel, rule: type[GeometryAdam], warmup: int | None
) -> None:
    geometry = with_statistics(model, ng_warmup_steps=warmup, kfac_update_freq=2)
    parameters = trained(model)
    twins = [p.detach().clone().requires_grad_() for p in parameters]
    optimizer = rule(parameters, lr=0.1)
    optimizer.bind(geometry)
    reference = torch.optim.AdamW(twins, lr=0.1)
    for group in geometry.groups:
        group.counts.capture_counts += 1
    same = []
    for seed in range(5):
        set_gradients(parameters, seed)
        set_gradients(twins, seed)
        geometry.step(precondition=False)
        optimizer.step()
        reference.step()
        pairs = zip(parameters, twins, strict=True)
        same.append(all(torch.allclose(p, twin, rtol=1e-6, atol=1e-9) for p, twin in pairs))
    assert same == ([True] * 5 if warmup is None else [True, True, True, False, False])


def test_the_momentum_of_the_warm_up_is_kept(model: PeftModel) -> None:
    """The average of raw gradients, whatever coordinates it is kept in, also where bases begin to count."""
    geometry = with_statistics(model, ng_warmup_steps=1, kfac_update_freq=1)
    parameters = trained(model)
    optimizer = EigenbasisAdam(parameters, lr=0.0)
    optimizer.bind(geometry)
    for group in geometry.groups:
        group.counts.capture_counts += 1
    expected = [torch.zeros_like(p) for p in parameters]
    for seed in range(3):
        set_gradients(parameters, seed)
        geometry.step(precondition=False)
        optimizer.step()
        expected = [0.9 * m + 0.1 * p.grad for m, p in zip(expected, parameters, strict=True)]
    for p, momentum in zip(parameters, expected, strict=True):
        state, side = optimizer.state[p], optimizer._where[p][1]
        basis = state["basis"].double()
        found = basis @ state["exp_avg"] if side == "a" else state["exp_avg"] @ basis.T
        torch.testing.assert_close(found, momentum, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [EigenbasisAdam, NaturalAdam])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_parameters_only_and_a_checkpoint_none_of_it(
    model: PeftModel, rule: type[GeometryAdam], dtype: torch.dtype
) -> None:
    geometry = with_statistics(model.to(dtype))
    geometry.refresh()
    parameters = trained(model)
    twins = [p.detach().float().requires_grad_() for p in parameters]
    optimizer, half = rule(twins, lr=1e-3), rule(parameters, lr=1e-3)
    half.bind(geometry)
    optimizer.bind(geometry)
    optimizer._where = {twin: half._where[p] for p, twin in zip(parameters, twins, strict=True)}
    for seed in range(2):
        set_gradients(parameters, seed)
        for p, twin in zip(parameters, twins, strict=True):
            twin.grad = p.grad.float()
            twin.data.copy_(p)
        half.step()
        optimizer.step()
    resumed = rule(parameters, lr=1e-3)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    for p, twin in zip(parameters, twins, strict=True):
        assert torch.equal(p, twin.to(dtype))
        for name, value in optimizer.state[twin].items():
            if torch.is_tensor(value):
                assert value.dtype == half.state[p][name].dtype == resumed.state[p][name].dtype == torch.float32
                assert torch.equal(value, half.state[p][name])
                assert torch.equal(value, resumed.state[p][name])


def test_a_geometry_optimizer_without_geometry_is_refused(tiny_llama: Any, lora_config: Callable[..., Any]) -> None:
    module = GritLitModule(tiny_llama, lora_config(), geometry=None, optimizer=EigenbasisAdam, lr_scheduler=None)
    module.configure_model()
    with pytest.raises(
        MisconfigurationException,
        match=r"model\.geometry: expected a GeometryConfig, which EigenbasisAdam needs, got null",
    ):
        module.configure_optimizers()


@pytest.mark.parametrize("setting", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}])
def test_bad_settings_are_named(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"EigenbasisAdam.*: expected"):
        EigenbasisAdam([torch.zeros(1)], **setting)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_balanced_reprojection_at_full_rank_changes_neither_the_loss_nor_the_next_sgd_step(
    make_tiny_llama: Callable[..., Any],
    lora_config: Callable[..., Any],
    random_batch: Callable[..., dict[str, Tensor]],
    momentum: float,
) -> None:
    batches = [random_batch(batch=8, length=12, seed=seed) for seed in range(4)]
    functions = {}
    for reproject in (False, True):
        torch.manual_seed(5)
        model = get_peft_model(make_tiny_llama(), lora_config())
        for p in trained(model):
            p.data = 0.3 * torch.randn(p.shape)
        config = GeometryConfig(
            kfac_update_freq=1, kfac_min_samples=1, damping_mode="absolute", kfac_damping=1e-9, grafting=False
        )
        geometry = RankSpaceGeometry(model, config)
        optimizer = torch.optim.SGD(trained(model), lr=1e-4, momentum=momentum)
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            geometry.start_micro_batch(batch["attention_mask"], (batch["labels"][:, 1:] != -100).sum())
            loss = model(**batch).loss
            loss.backward()
            losses.append(float(loss.detach()))
            geometry.finish_micro_batch()
            geometry.step()
            optimizer.step()
            if reproject:
                geometry.reproject(maps_rule("balanced"), optimizer=optimizer)
        functions[reproject] = [s.up.weight.detach() @ s.down.weight.detach() for s in geometry.groups[0].sites]
        functions[reproject].append(torch.tensor(losses))
    for plain, moved in zip(functions[False], functions[True], strict=True):
        torch.testing.assert_close(moved, plain, rtol=2e-3, atol=2e-4 * float(plain.abs().max()))


def test_the_rank_holds_though_packed_moments_push_without_a_gradient(
    make_tiny_llama: Any, lora_config: Any, random_batch: Any, tmp_path: Path
) -> None:
    """Zero is no byte of its own in the 8-bit state that bitsandbytes keeps on CPUs."""
    optim = pytest.importorskip("bitsandbytes.optim")
    module = GritLitModule(
        make_tiny_llama(num_hidden_layers=1),
        lora_config(),
        GeometryConfig(kfac_update_freq=1, kfac_min_samples=1),
        optimizer=lambda parameters: optim.AdamW8bit(parameters, lr=0.01, min_8bit_size=16),
        lr_scheduler=None,
    )
    cut = RankAdaptation(every_n_steps=1, min_rank=1, threshold=0.3, stop_step=1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, callbacks=[cut], **quiet)
    batches = DataLoader([random_batch(seed=seed) for seed in range(6)], batch_size=None)
    trainer.fit(module, batches, batches)
    assert module.geometry is not None
    (group,) = module.geometry.groups
    assert int(group.ranks.max()) < group.r
    for b, rank in zip(group.factors("b"), group.ranks.tolist(), strict=True):
        assert bool(b[:, :rank].any())
        assert not bool(b[:, rank:].any())
