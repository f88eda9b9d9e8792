"""The geometry against an independent implementation that stores full x and δ, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.rank_space import RankSpaceGeometry

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def observe(geometry: RankSpaceGeometry, model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """One accumulation window over `batches`, as GritLitModule runs it."""
    for batch in batches:
        tokens = (batch["labels"][:, 1:] != -100).sum()
        geometry.start_micro_batch(batch["attention_mask"], tokens * float(len(batches)))
        (mean_loss(model, batch) / len(batches)).backward()
        geometry.finish_micro_batch()
    geometry.step()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def split(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, len(batch["input_ids"]), size)]


@pytest.mark.parametrize("size", [8, 4, 1, 3])
def test_covariances_equal_those_of_stored_inputs_and_output_gradients(
    make_geometry: Callable[..., Any],
    random_batch: Callable[..., Any],
    size: int,
    truth: Callable[..., Any],
) -> None:
    model, geometry = make_geometry(adapter={"target_modules": ALL_LINEAR})
    batch = random_batch(batch=8, length=12, pad=[0, 3, 5, 1, 0, 7, 2, 4], prompt=2)
    expected = truth(model, [batch])
    observe(geometry, model, split(batch, size))
    assert geometry.layers.keys() == expected.keys()
    for name, view in geometry.layers.items():
        a_cov, g_cov = expected[name]
        assert view.a_cov.dtype == torch.float32
        assert view.n_samples == int(batch["attention_mask"].sum())
        assert relative_error(view.a_cov, a_cov) < 1e-5  # float32 forward and backward
        assert relative_error(view.g_cov, g_cov) < 1e-4


def test_the_moving_average_forgets_and_the_running_mean_does_not(
    make_geometry: Callable[..., Any],
    random_batch: Callable[..., Any],
    truth: Callable[..., Any],
) -> None:
    batches = [random_batch(batch=2, length=10, seed=seed) for seed in range(3)]
    found = {}
    for averaging in ("mean", "ema"):
        model, geometry = make_geometry(cov_averaging=averaging, ema_beta=0.5)
        for batch in batches:
            observe(geometry, model, [batch])
        found[averaging] = {name: view.a_cov for name, view in geometry.layers.items()}
    singles = [truth(make_geometry()[0], [batch]) for batch in batches]
    for name in found["mean"]:
        c1, c2, c3 = (single[name][0] for single in singles)
        assert relative_error(found["mean"][name], (c1 + c2 + c3) / 3) < 1e-5
        corrected = (0.25 * c1 + 0.5 * c2 + c3) / 1.75  # β-weighted, divided by 1 − β³ (up to the common factor 1 − β)
        assert relative_error(found["ema"][name], corrected) < 1e-5


@pytest.mark.parametrize("pairing", ["kfac", "swapped"])
def test_step_solves_with_the_damped_factors(
    make_geometry: Callable[..., Any], random_batch: Callable[..., Any], pairing: str
) -> None:
    model, geometry = make_geometry(
        kfac_update_freq=1, kfac_damping=1e-2, damping_mode="absolute", grafting=False, pairing=pairing
    )
    batch = random_batch(batch=8, length=12)
    tokens = (batch["labels"][:, 1:] != -100).sum()
    geometry.start_micro_batch(batch["attention_mask"], tokens)
    mean_loss(model, batch).backward()
    geometry.finish_micro_batch()
    raw = {site.name: (site.down.weight.grad.clone(), site.up.weight.grad.clone()) for site in geometry.groups[0].sites}
    geometry.step()
    eye = torch.eye(4, dtype=torch.float64)
    for site in geometry.groups[0].sites:
        view = geometry.layers[site.name]
        a = view.a_cov.double() + 1e-2 * eye
        g = view.g_cov.double() + 1e-2 * eye
        if pairing == "swapped":
            a, g = g, a
        grad_a, grad_b = (grad.double() for grad in raw[site.name])
        assert relative_error(site.down.weight.grad, torch.linalg.solve(g, grad_a)) < 1e-3
        assert relative_error(site.up.weight.grad, torch.linalg.solve(a, grad_b.T).T) < 1e-3


def test_gradients_pass_unchanged_until_the_first_refresh_and_through_warm_up(
    make_geometry: Callable[..., Any], random_batch: Callable[..., Any]
) -> None:
    changed = {}
    for label, settings in {
        "refresh": {"kfac_update_freq": 2, "kfac_min_samples": 1},
        "warmup": {"kfac_update_freq": 1, "ng_warmup_steps": 1, "kfac_min_samples": 1},
        "samples": {"kfac_update_freq": 1, "kfac_min_samples": 30},
    }.items():
        model, geometry = make_geometry(**settings)
        changed[label] = []
        for seed in range(2):
            batch = random_batch(batch=2, length=10, seed=seed)
            model.zero_grad()
            mean_loss(model, batch).backward()
            raw = geometry.groups[0].sites[0].down.weight.grad.clone()
            model.zero_grad()
            observe(geometry, model, [batch])
            changed[label].append(not torch.equal(raw, geometry.groups[0].sites[0].down.weight.grad))
    assert changed == {"refresh": [False, True], "warmup": [False, True], "samples": [False, True]}


def test_grafting_keeps_the_norm_of_every_factor_gradient(
    make_geometry: Callable[..., Any], random_batch: Callable[..., Any]
) -> None:
    model, geometry = make_geometry(kfac_update_freq=1, kfac_min_samples=1, grafting=True)
    batch = random_batch()
    mean_loss(model, batch).backward()
    raw = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    observe(geometry, model, [batch])
    new = [p.grad for p in model.parameters() if p.requires_grad]
    for before, after in zip(raw, new, strict=True):
        assert not torch.allclose(before, after, rtol=1e-2, atol=0)
        torch.testing.assert_close(before.norm(), after.norm(), rtol=1e-5, atol=0)


def test_a_silent_layer_is_named_at_the_first_refresh(
    make_geometry: Callable[..., Any], random_batch: Callable[..., Any]
) -> None:
    model, geometry = make_geometry(kfac_update_freq=2)
    layer = next(iter(model.base_model.model.model.layers)).self_attn.v_proj
    layer.lora_A["default"].forward = lambda x: nn.functional.linear(x, layer.lora_A["default"].weight).detach()
    observe(geometry, model, [random_batch()])
    with pytest.raises(RuntimeError, match=r"all 4 adapted layers .* got none of 1: .*layers\.0\.self_attn\.v_proj"):
        observe(geometry, model, [random_batch()])


def test_evaluation_passes_leave_no_trace(make_geometry: Callable[..., Any], random_batch: Callable[..., Any]) -> None:
    model, geometry = make_geometry()
    mean_loss(model, random_batch()).backward()
    with torch.no_grad():
        mean_loss(model, random_batch(seed=1))
    geometry.step()
    assert {view.n_samples for view in geometry} == {0}
    assert all(bool((view.a_cov == 0).all()) for view in geometry)


def test_a_non_finite_micro_batch_never_enters_the_estimate(
    make_geometry: Callable[..., Any], random_batch: Callable[..., Any]
) -> None:
    undisturbed, clean = make_geometry()
    observe(clean, undisturbed, [random_batch()])
    expected = {name: view.g_cov for name, view in clean.layers.items()}
    model, geometry = make_geometry()
    good, bad = random_batch(), random_batch(seed=1)
    for batch, poison in ((bad, float("nan")), (good, 1.0), (bad, float("inf"))):
        tokens = (batch["labels"][:, 1:] != -100).sum()
        geometry.start_micro_batch(batch["attention_mask"], tokens)
        (mean_loss(model, batch) * poison).backward()
        geometry.finish_micro_batch()
    geometry.step()
    for name, view in geometry.layers.items():
        torch.testing.assert_close(view.g_cov, expected[name])
        assert view.counters["rejected"] == 2
        assert view.n_samples == 32


def test_state_survives_a_round_trip_and_refuses_another_adapter(
    make_geometry: Callable[..., Any], random_batch: Callable[..., Any]
) -> None:
    model, geometry = make_geometry(kfac_update_freq=1, kfac_min_samples=1)
    observe(geometry, model, [random_batch()])
    state = geometry.state_dict()
    _, twin = make_geometry(kfac_update_freq=1, kfac_min_samples=1)
    twin.load_state_dict(state)
    for name, view in twin.layers.items():
        assert torch.equal(view.a_cov, geometry.layers[name].a_cov)
        assert view.n_samples == geometry.layers[name].n_samples
    assert torch.equal(twin.groups[0].derived.a_inverse, geometry.groups[0].derived.a_inverse)
    _, other = make_geometry(adapter={"r": 8})
    with pytest.raises(ValueError, match="adapter configuration"):
        other.load_state_dict(state)


@pytest.mark.parametrize("mode", ["one_sided", "two_sided", "balanced"])
def test_reprojection_at_full_rank_keeps_the_function(
    make_geometry: Callable[..., Any], random_batch: Callable[..., Any], mode: Any
) -> None:
    from grit_lightning.functional import maps_rule

    model, geometry = make_geometry(kfac_min_samples=1)
    observe(geometry, model, [random_batch()])
    before = [site.up.weight @ site.down.weight for site in geometry.groups[0].sites]
    down = geometry.groups[0].sites[0].down.weight.clone()
    geometry.reproject(maps_rule(mode))
    after = [site.up.weight @ site.down.weight for site in geometry.groups[0].sites]
    assert not torch.equal(down, geometry.groups[0].sites[0].down.weight)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-5)
    assert geometry.reprojection_count == 1


@pytest.mark.parametrize("mode", ["one_sided", "two_sided", "balanced"])
def test_reprojection_projects_as_the_method_says_and_statistics_follow(
    make_geometry: Callable[..., Any],
    random_batch: Callable[..., Any],
    mode: Any,
    truth: Callable[..., Any],
) -> None:
    from grit_lightning.functional import maps_rule

    model, geometry = make_geometry(kfac_min_samples=1)
    batch = random_batch(batch=4)
    observe(geometry, model, [batch])
    sites = geometry.groups[0].sites
    before = [(site.down.weight.detach().clone(), site.up.weight.detach().clone()) for site in sites]
    covariances = [(view.a_cov, view.g_cov) for view in geometry]
    geometry.reproject(maps_rule(mode), dict.fromkeys(geometry.layers, 2))
    assert set(geometry.ranks.values()) == {2}
    assert geometry.mean_rank == 2.0
    for site, (down, up), (a_cov, g_cov) in zip(sites, before, covariances, strict=True):
        p_a, p_g = (torch.linalg.eigh(cov.double())[1][:, 2:] for cov in (a_cov, g_cov))
        p_a, p_g = p_a @ p_a.T, p_g @ p_g.T
        delta = site.up.weight.detach().double() @ site.down.weight.detach().double()
        if mode == "one_sided":
            assert relative_error(delta, up.double() @ p_a @ p_a @ down.double()) < 1e-4
        elif mode == "two_sided":
            assert relative_error(delta, up.double() @ p_g @ p_a @ down.double()) < 1e-4
        assert torch.linalg.matrix_rank(delta) == 2
        assert bool((site.up.weight[:, 2:] == 0).all())
    expected = truth(model, [batch])  # with the new factors, on the inputs the old ones were measured on
    first = next(iter(geometry.layers.values()))
    assert relative_error(first.a_cov, expected[first.name][0]) < 1e-4


def test_parameter_counts_of_the_paper_on_the_meta_device(lora_config: Callable[..., Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shapes = {
        24_313_856: (LlamaConfig(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
                                 num_key_value_heads=8, head_dim=128, vocab_size=128256), 16),
        83_886_080: (LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                                 num_key_value_heads=8, head_dim=128, vocab_size=128256), 32),
    }  # fmt: skip
    for expected, (config, r) in shapes.items():
        with torch.device("meta"):
            model = get_peft_model(LlamaForCausalLM(config), lora_config(r=r, target_modules=ALL_LINEAR))
        geometry = RankSpaceGeometry(model, GeometryConfig())
        assert geometry.effective_parameters == expected
        assert geometry.trainable_parameters == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kfac_update_freq": 0}, "kfac_update_freq: expected an integer ≥ 1"),
        ({"kfac_damping": -1.0}, "kfac_damping: expected a number ≥ 0"),
        ({"pairing": "other"}, "pairing: expected one of kfac, swapped"),
        ({"cov_averaging": "median"}, "cov_averaging: expected one of mean, ema"),
        ({"ema_beta": 1.0}, "ema_beta"),
    ],
)
def test_bad_settings_name_the_field(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeometryConfig(**settings)


def test_conv1d_layers_of_gpt2_are_found_and_measured(
    random_batch: Callable[..., Any], randomize: Callable[..., Any], truth: Callable[..., Any]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=320, n_positions=64))
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = randomize(get_peft_model(gpt2.eval(), config))
    batch = random_batch(batch=3, length=8)
    expected = truth(model, [batch])
    geometry = RankSpaceGeometry(model, GeometryConfig())
    observe(geometry, model, [batch])
    for name, view in geometry.layers.items():
        assert relative_error(view.a_cov, expected[name][0]) < 1e-4
        assert relative_error(view.g_cov, expected[name][1]) < 1e-4


def test_layers_of_different_rank_form_their_own_groups(
    make_geometry: Callable[..., Any],
    random_batch: Callable[..., Any],
    truth: Callable[..., Any],
) -> None:
    model, geometry = make_geometry(
        adapter={"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, kfac_update_freq=1, kfac_min_samples=1
    )
    batch = random_batch()
    expected = truth(model, [batch])
    observe(geometry, model, [batch])
    assert sorted(group.r for group in geometry.groups) == [2, 4]
    for name, view in geometry.layers.items():
        assert relative_error(view.a_cov, expected[name][0]) < 1e-4


def test_b_is_exactly_zero_beyond_the_rank_however_often_ranks_fall_and_rise(
    make_geometry: Callable[..., Any], random_batch: Callable[..., Any]
) -> None:
    """What `grit export` relies on: rounding of the maps must not leave anything behind."""
    from grit_lightning.functional import maps_rule

    model, geometry = make_geometry(adapter={"r": 8}, kfac_min_samples=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed, rank in enumerate((3, 4, 2, 5, 3)):
        for batch in (random_batch(seed=seed), random_batch(seed=seed + 10)):
            optimizer.zero_grad()
            observe(geometry, model, [batch])
            optimizer.step()
        geometry.reproject(maps_rule("balanced"), optimizer=optimizer)
        geometry.set_ranks(maps_rule("balanced"), dict.fromkeys(geometry.layers, rank), optimizer=optimizer)
        assert set(geometry.ranks.values()) == {rank}
        for site in geometry.groups[0].sites:
            assert bool((site.up.weight[:, rank:] == 0).all())
