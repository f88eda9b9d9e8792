"""A second estimate beside the first: it follows changes of coordinates, and the edit of both is that of the dense solution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from grit_lightning import GeometryConfig, RankSpaceGeometry
from grit_lightning import functional as F
from grit_lightning.geometry.cross_moments import CrossMoments
from grit_lightning.geometry.rank_rules import RANK_RULES
from grit_lightning.geometry.retention import judge_by_retention, judge_by_task, retention_edit

Factory = Callable[..., Any]
MEAN = {"cov_averaging": "mean", "kfac_min_samples": 1}


def take(model: PeftModel, geometry: RankSpaceGeometry, batch: dict[str, Tensor]) -> None:
    """One micro-batch into a geometry, as one step."""
    labels = (batch["labels"][:, 1:] != -100).sum()
    geometry.start_micro_batch(batch["attention_mask"], labels)
    torch.autograd.grad(model(**batch, use_cache=False).loss, [p for p in model.parameters() if p.requires_grad])
    geometry.finish_micro_batch()
    geometry.finish_window()


@pytest.fixture
def pair(
    make_geometry: Factory, random_batch: Factory
) -> Iterator[tuple[PeftModel, RankSpaceGeometry, RankSpaceGeometry]]:
    """A model, the task's estimate, and general text's beside it."""
    model, task = make_geometry(**MEAN)
    general = task.beside(model, GeometryConfig(**MEAN))
    take(model, task, random_batch(seed=1))
    take(model, general, random_batch(batch=4, seed=2, pad=3))
    for geometry in (task, general):
        geometry.reduce()
    yield model, task, general
    task.release(general)


def updates(geometry: RankSpaceGeometry) -> list[Tensor]:
    sites = [site for group in geometry.groups for site in group.sites]
    return [(site.up.weight @ site.down.weight).detach().double() for site in sites]


def test_each_estimate_hears_its_own_text_alone(
    pair: tuple[PeftModel, RankSpaceGeometry, RankSpaceGeometry], truth: Factory, random_batch: Factory
) -> None:
    model, task, general = pair
    for geometry, batch in ((task, random_batch(seed=1)), (general, random_batch(batch=4, seed=2, pad=3))):
        for name, (a_cov, g_cov) in truth(model, [batch]).items():
            torch.testing.assert_close(geometry.layers[name].a_cov.double(), a_cov, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(geometry.layers[name].g_cov.double(), g_cov, rtol=1e-4, atol=1e-7)


def test_general_text_leaves_no_gradient(pair: tuple[PeftModel, RankSpaceGeometry, RankSpaceGeometry]) -> None:
    model, _, _ = pair
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_edit_is_the_map_of_both_estimates(pair: tuple[PeftModel, RankSpaceGeometry, RankSpaceGeometry]) -> None:
    _, task, general = pair
    before = [site.up.weight.detach().double().clone() for site in task.groups[0].sites]
    (mine,), (other,) = task.groups, general.groups
    x = F.retention_map(mine.a_cov, mine.g_cov, other.a_cov, other.g_cov, mu=0.3)
    g_cov = mine.g_cov
    planned = retention_edit(task, general, mu=0.3, damping=1e-4)
    task.edit(planned.maps)
    for b, site, of_layer in zip(before, mine.sites, x, strict=True):
        torch.testing.assert_close(site.up.weight.detach().double(), b @ of_layer.double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine.g_cov, F.symmetrize(x.mT @ g_cov @ x), rtol=1e-4, atol=1e-7)
    assert planned.layers == 4
    assert planned.task_cost > 0
    assert planned.general_cost_after < planned.general_cost_before


@pytest.mark.parametrize("mode", ["balanced", "one_sided"])
def test_a_reprojection_at_full_rank_changes_nothing_in_the_edit(
    make_geometry: Factory, random_batch: Factory, mode: str
) -> None:
    """Between two micro-batches of general text."""

    def edited(*, reprojects: bool) -> tuple[list[Tensor], float]:
        model, task = make_geometry(**MEAN)
        general = task.beside(model, GeometryConfig(**MEAN))
        take(model, task, random_batch(seed=1))
        take(model, general, random_batch(batch=4, seed=2))
        if reprojects:
            task.reproject(F.maps_rule(mode))
        take(model, general, random_batch(seed=3))
        planned = retention_edit(task, general, mu=0.3, damping=0.0)
        task.edit(planned.maps)
        return updates(task), planned.task_cost

    (plain, cost), (turned, cost_turned) = edited(reprojects=False), edited(reprojects=True)
    for one, other in zip(plain, turned, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-3 * float(one.abs().max()))
    assert cost == pytest.approx(cost_turned, rel=1e-2)


def test_what_lies_beyond_a_reduced_rank_has_no_part_in_the_edit(
    pair: tuple[PeftModel, RankSpaceGeometry, RankSpaceGeometry],
) -> None:
    _, task, general = pair
    task.reproject(F.maps_rule("balanced"), dict.fromkeys(task.layers, 2))
    (mine,), (other,) = task.groups, general.groups
    inside = [cov[:, :2, :2] for cov in (mine.a_cov, mine.g_cov, other.a_cov, other.g_cov)]
    before = [site.up.weight.detach().clone() for site in mine.sites]
    task.edit(retention_edit(task, general, mu=0.3, damping=1e-4).maps)
    for b, site, x in zip(before, mine.sites, F.retention_map(*inside, mu=0.3), strict=True):
        torch.testing.assert_close(site.up.weight.detach()[:, :2], b[:, :2] @ x, rtol=1e-3, atol=1e-6)
        assert bool((site.up.weight[:, 2:] == 0).all())


def test_layers_with_too_few_samples_stay(make_geometry: Factory, random_batch: Factory) -> None:
    model, task = make_geometry(**MEAN)
    general = task.beside(model, GeometryConfig(**MEAN))
    take(model, task, random_batch(seed=1))
    assert retention_edit(task, general, mu=0.3, damping=1e-4).layers == 0
    before = updates(task)
    task.edit(retention_edit(task, general, mu=0.3, damping=1e-4).maps)
    assert all(torch.equal(one, other) for one, other in zip(before, updates(task), strict=True))


def test_a_released_estimate_hears_and_follows_no_more(
    pair: tuple[PeftModel, RankSpaceGeometry, RankSpaceGeometry],
) -> None:
    _, task, general = pair
    before = general.groups[0].a_cov.clone()
    task.release(general)
    task.reproject(F.maps_rule("balanced"))
    assert torch.equal(general.groups[0].a_cov, before)


def test_the_penalty_is_that_of_an_independent_measurement(make_geometry: Factory, random_batch: Factory) -> None:
    """Against autograd through ½ tr(Σ_δ ΔW Σ_x ΔWᵀ), with Σ_x and Σ_δ from hooks of this test on the whole layers."""
    model, task = make_geometry(**MEAN)
    general, batch = task.beside(model, GeometryConfig(**MEAN)), random_batch(seed=2, pad=[0, 4])
    cross, real = CrossMoments(general), batch["attention_mask"].bool().flatten()
    seen: dict[str, list[Tensor]] = {}
    layers = {name: model.get_submodule(name) for name in task.layers}
    labels = (batch["labels"][:, 1:] != -100).sum()
    for name, layer in layers.items():

        def keep(module: Any, args: Any, output: Tensor, name: str = name) -> None:
            seen[name] = [args[0].detach().flatten(0, 1)[real].double()]
            output.register_hook(lambda delta: seen[name].append((delta * labels).flatten(0, 1)[real].double()))

        layer.register_forward_hook(keep)
    cross.start(batch["attention_mask"], labels)
    take(model, general, batch)
    general.reduce()
    cross.stop()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    cross.add_penalty(0.7)
    for name, site in zip(layers, task.groups[0].sites, strict=True):
        x, delta = seen[name]
        a, b = (factor.weight.detach().double().requires_grad_() for factor in (site.down, site.up))
        update = site.scaling * b @ a
        exposure = 0.5 * torch.trace(delta.T @ delta / len(delta) @ update @ (x.T @ x / len(x)) @ update.T)
        for factor, expected in zip((site.down, site.up), torch.autograd.grad(0.7 * exposure, (a, b)), strict=True):
            assert factor.weight.grad is not None
            error = (factor.weight.grad.double() - expected).abs().max() / expected.abs().max()
            assert error < 1e-4  # float32 sums over tokens


def test_directions_that_general_text_pays_for_go_first_by_the_retention_metric(
    pair: tuple[PeftModel, RankSpaceGeometry, RankSpaceGeometry],
) -> None:
    """The task needs the first direction most, and general text hears nothing but it."""
    _, task, general = pair
    (mine,), (other,) = task.groups, general.groups
    for group, values in ((mine, [4.0, 2.0, 1.0, 0.5]), (other, [100.0, 0.0, 0.0, 0.0])):
        group.statistics.total.weight.fill_(1.0)
        group.statistics.total.a = torch.eye(4).repeat(4, 1, 1)
        group.statistics.total.g = torch.diag(torch.tensor(values)).repeat(4, 1, 1)
    before = [site.down.weight.detach().clone() for site in mine.sites]
    judge_by_retention(
        task, general, mu=0.2, damping=0.0
    )  # leaves 1 / (1 + 0.2 · 100 / 4) = 1/6 of the first: σ² is 4 / 36
    spectrum = RANK_RULES["balanced"](0.9).spectrum(mine.a_cov, mine.judged_g_cov)
    torch.testing.assert_close(spectrum[0], torch.tensor([2.0, 1.0, 0.5, 4.0 / 36]), rtol=1e-4, atol=1e-5)
    task.reproject(F.maps_rule("balanced"), dict.fromkeys(task.layers, 3))
    for a, site in zip(before, mine.sites, strict=True):
        directions = torch.nn.functional.normalize(site.down.weight.detach(), dim=1)
        expected = torch.nn.functional.normalize(a, dim=1)[[1, 2, 3, 0]]
        torch.testing.assert_close((directions * expected).sum(1).abs(), torch.ones(4), rtol=1e-4, atol=1e-4)
    judge_by_task(task)
    torch.testing.assert_close(mine.judged_g_cov, mine.g_cov)
