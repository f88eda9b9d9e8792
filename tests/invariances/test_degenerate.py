"""Non-finite and degenerate input: nothing broken enters an estimate or a gradient, and every such event is counted."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.amp import GradScaler

from grit_lightning import GeometryConfig, RankSpaceGeometry
from grit_lightning import functional as F
from grit_lightning.callbacks import SpectraLogger

EVERY_STEP = GeometryConfig(kfac_update_freq=1, kfac_min_samples=1, grafting=False, damping_mode="absolute")


def observe(geometry: RankSpaceGeometry, model: Any, batch: dict[str, Tensor]) -> None:
    """One micro-batch, without closing the window."""
    geometry.start_micro_batch(batch["attention_mask"], learnt(batch))
    model(**batch).loss.backward()
    geometry.finish_micro_batch()


def learnt(batch: dict[str, Tensor]) -> Tensor:
    """Number of label tokens."""
    return (batch["labels"][:, 1:] != -100).sum()


class Heard:
    """What reaches the rank-space hooks of every layer, in float64, one entry a micro-batch: an independent pair of hooks."""

    def __init__(self, geometry: RankSpaceGeometry) -> None:
        sites = [site for group in geometry.groups for site in group.sites]
        self.pairs: dict[str, list[list[Tensor]]] = {site.name: [] for site in sites}
        for site in sites:
            site.down.register_forward_hook(partial(self._on_forward, self.pairs[site.name]))

    def _on_forward(self, pairs: list[list[Tensor]], module: Any, args: Any, output: Tensor) -> None:
        pairs.append([output.detach().double()])
        output.register_hook(lambda gradient, pair=pairs[-1]: pair.append(gradient.double()))

    def finite(self, name: str) -> list[bool]:
        """Whether a layer heard only finite numbers, by micro-batch."""
        return [all(bool(part.isfinite().all()) for part in pair) for pair in self.pairs[name]]

    def covariances(self, name: str, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, int]:
        """Means over the real tokens of the finite micro-batches of a aᵀ and g gᵀ, and the number of those tokens."""
        a, g = [], []
        for batch, pair, finite in zip(batches, self.pairs[name], self.finite(name), strict=True):
            if finite:
                real = batch["attention_mask"].bool()
                a.append(pair[0][real])
                g.append(pair[1][real] * float(learnt(batch)))  # of the sum of token losses, not of their mean
        a_rows, g_rows = torch.cat(a), torch.cat(g)
        return a_rows.T @ a_rows / len(a_rows), g_rows.T @ g_rows / len(g_rows), len(a_rows)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("where", "attention"), [("gradient", "eager"), ("activation", "eager"), ("activation", "sdpa")]
)
def test_a_broken_micro_batch_is_left_out_of_the_layers_that_hear_it_and_counts_in_the_others(
    poison: float, where: str, attention: str, make_geometry: Any, random_batch: Any
) -> None:
    model, geometry = make_geometry(llama={"attn_implementation": attention})
    bad, good = random_batch(batch=2, length=12, seed=1), random_batch(batch=2, length=12, pad=[0, 3])
    first = geometry.groups[0].sites[0]  # a query projection of the lowest layer: no other layer is below it

    def spoil(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[1, 7, 2] = poison
        return tensor

    def spoil_gradient(module: Any, args: Any, output: Tensor) -> None:
        output.register_hook(spoil)

    def spoil_activation(module: Any, args: Any, output: Tensor) -> Tensor:
        return spoil(output)

    change = spoil_gradient if where == "gradient" else spoil_activation
    handle = first.down.register_forward_hook(change, prepend=True)  # before the hooks of the geometry and of `Heard`
    heard = Heard(geometry)
    observe(geometry, model, bad)
    handle.remove()
    observe(geometry, model, good)
    geometry.step()

    broken = [name for name in geometry.layers if heard.finite(name) != [True, True]]
    assert all(heard.finite(name) == [False, True] for name in broken)
    if where == "gradient":
        assert broken == [first.name]
    elif attention == "eager":
        assert broken == list(geometry.layers)
    else:  # torch's CPU kernel of 2.14 gives finite outputs for broken queries, that of 2.13 does not: who hears is its choice
        assert first.name in broken
    assert [name for name, view in geometry.layers.items() if view.counters["rejected"]] == broken
    assert geometry.counters["rejected"] == len(broken)
    for name, view in geometry.layers.items():
        a_cov, g_cov, tokens = heard.covariances(name, [bad, good])
        assert tokens == view.n_samples == (21 if name in broken else 45)
        assert bool(view.a_cov.isfinite().all() and view.g_cov.isfinite().all())
        torch.testing.assert_close(view.a_cov.double(), a_cov, rtol=1e-4, atol=1e-6 * float(a_cov.abs().max()))
        torch.testing.assert_close(view.g_cov.double(), g_cov, rtol=1e-4, atol=1e-6 * float(g_cov.abs().max()))


def test_a_factor_that_is_not_positive_definite_climbs_the_ladder(
    make_module: Any, random_batch: Any, measure: Any
) -> None:
    model = make_module(geometry=None).peft_model
    geometry = measure(model, [random_batch()], config=replace(EVERY_STEP, kfac_damping=1e-3))
    (group,) = geometry.groups
    assert geometry.counters["escalations"] == 0
    group.statistics.total.weight[1] = 1.0
    group.statistics.total.a[1] = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05]))  # needs λ > 0.05: 1e-3, 1e-2, 1e-1
    others = group.derived.a_inverse[[0, 2, 3]].clone()
    geometry.refresh()
    torch.testing.assert_close(group.derived.a_inverse[1], torch.diag(1 / torch.tensor([1.1, 1.1, 1.1, 0.05])))
    assert torch.equal(group.derived.a_inverse[[0, 2, 3]], others)
    assert [view.counters["escalations"] for view in geometry] == [0, 2, 0, 0]


@pytest.mark.parametrize("grafting", [False, True])
def test_a_gradient_that_overflows_falls_back_to_the_raw_one_in_its_layer_only(
    grafting: bool, make_geometry: Any, random_batch: Any
) -> None:
    model, geometry = make_geometry(**asdict(replace(EVERY_STEP, grafting=grafting)))
    batch = random_batch()
    model(**batch).loss.backward()
    raw = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    refresh = geometry.refresh

    def refresh_badly() -> None:
        refresh()
        geometry.groups[0].derived.a_inverse[2] = torch.inf  # for the B of layer 2

    geometry.refresh = refresh_badly
    observe(geometry, model, batch)
    geometry.step()
    assert [view.counters["fallbacks"] for view in geometry] == [0, 0, 1, 0]
    for index, site in enumerate(geometry.groups[0].sites):
        for factor, module in (("A", site.down), ("B", site.up)):
            before = raw[f"{site.name}.lora_{factor}.default.weight"]
            assert bool(module.weight.grad.isfinite().all())
            assert torch.equal(module.weight.grad, before) == ((index, factor) == (2, "B")), (index, factor)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_grafting_gives_the_raw_length_where_squares_leave_float32(size: float) -> None:
    raw, direction = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    expected = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1) * raw.flatten(1).norm(dim=1).view(-1, 1, 1)
    torch.testing.assert_close(F.graft(direction * size, raw), expected)
    torch.testing.assert_close(F.graft(direction, raw * size) / size, expected)
    torch.testing.assert_close(F.trust_clip(direction * size, raw * size * 0.1, 1.0) / size / 0.1, expected)
    assert not F.graft(direction.index_fill(0, torch.tensor([0]), torch.inf), raw)[0].isfinite().any()


def test_an_estimate_that_has_overflowed_leaves_gradients_raw(
    make_module: Any, random_batch: Any, measure: Any
) -> None:
    model = make_module(geometry=None).peft_model
    geometry = measure(model, [random_batch()], config=EVERY_STEP)
    (group,) = geometry.groups
    group.statistics.total.a[1, 0, 0] = torch.inf
    geometry.refresh()
    assert torch.equal(group.derived.a_inverse[1], torch.eye(4))
    assert geometry.counters["escalations"] == 0


@pytest.mark.filterwarnings("ignore:You are trying to .self.log")
def test_events_are_logged_in_total_and_by_layer(make_module: Any, random_batch: Any, fit: Any) -> None:
    logged: dict[str, float] = {}

    class Keep(pl.loggers.CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.update(metrics)

    class Count(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            (group,) = pl_module.geometry.groups
            group.counts.rejected[0], group.counts.fallbacks[1], group.counts.escalations[2] = 3, 4, 5

    module = make_module(geometry=GeometryConfig(kfac_update_freq=50))
    fit(
        module,
        [random_batch()],
        logger=Keep(""),
        callbacks=[Count(), SpectraLogger(every_n_steps=1)],
        log_every_n_steps=1,
    )
    layers = [name.removeprefix("base_model.model.") for name in module.geometry.layers]
    events = {"rejected": 3, "fallbacks": 4, "escalations": 5}
    for index, (event, count) in enumerate(events.items()):
        assert logged[f"grit/{event}"] == count
        assert logged[f"grit/{event}/{layers[index]}"] == count


class WatchesOverflow(Callback):
    """Compares weights and geometry before and after every step that the scaler skips, bit for bit."""

    def __init__(self) -> None:
        self.skipped = self.taken = 0
        self.before: tuple[float, dict[str, Tensor], dict[str, Any]] | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.before = (trainer.precision_plugin.scaler.get_scale(), *state_of(pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert self.before is not None
        scale, *before = self.before
        same = all(
            torch.equal(old[key], new[key]) for old, new in zip(before, state_of(pl_module), strict=True) for key in old
        )
        if trainer.precision_plugin.scaler.get_scale() < scale:
            self.skipped += 1
            assert same
        else:
            self.taken += 1
            assert not same


def state_of(module: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    (group,) = module.geometry.groups
    parts = {"counts": group.counts.state_dict(), "derived": group.derived.state_dict()}
    parts |= {"statistics": group.statistics.state_dict(), "ranks": {"ranks": group.ranks}}
    geometry: dict[str, Tensor] = {}
    for part, state in parts.items():
        for name, value in state.items():
            values = value if isinstance(value, list) else [value]
            tensors = {f"{part}.{name}.{index}": tensor for index, tensor in enumerate(values)}
            geometry |= {key: tensor for key, tensor in tensors.items() if isinstance(tensor, Tensor)}
    for counted in ("rejected", "capture_counts"):  # these see the batch that overflowed
        del geometry[f"counts.{counted}.0"]
    geometry["steps"] = torch.tensor(module.geometry.state_dict()["steps"])
    return {name: p.detach().clone() for name, p in module.named_parameters()}, geometry


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_grad_scaler_overflow_leaves_geometry_and_weights_untouched(
    accumulate: int, make_module: Any, random_batch: Any, fit: Any
) -> None:
    module = make_module(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    watch = WatchesOverflow()
    precision = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**22, growth_interval=1000))
    batches = [random_batch(batch=2, length=12, seed=seed) for seed in range(12)]
    fit(module, batches, plugins=[precision], callbacks=[watch], accumulate_grad_batches=accumulate)
    assert watch.skipped >= 2
    assert watch.taken >= 2
    assert module.geometry.counters["rejected"] >= watch.skipped  # counted, although nothing came of it
