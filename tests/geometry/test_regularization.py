"""The regularisers' gradients against autograd through an explicit penalty, and what they must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from grit_lightning import RankSpaceGeometry


def backward(model: PeftModel, geometry: RankSpaceGeometry, batch: dict[str, Tensor], accumulate: int = 1) -> None:
    model.zero_grad()
    for _ in range(accumulate):
        tokens = (batch["labels"][:, 1:] != -100).sum()
        loss_scale = 1.0 / accumulate if geometry.config.regularised else None
        geometry.start_micro_batch(batch["attention_mask"], tokens * accumulate, loss_scale)
        (model(**batch).loss / accumulate).backward()
        geometry.finish_micro_batch()


@pytest.mark.parametrize(
    "settings", [{"curvature_penalty": 0.7}, {"reprojection_penalty": 0.3}], ids=lambda s: next(iter(s))
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_of_the_penalty_is_that_of_autograd(
    make_geometry: Callable[..., Any],
    random_batch: Callable[..., Any],
    settings: dict[str, float],
    accumulate: int,
) -> None:
    batch = random_batch(batch=3, length=10, pad=[0, 4, 2])
    model, geometry = make_geometry(kfac_update_freq=1, kfac_min_samples=1, **settings)
    (group,) = geometry.groups
    group.ranks[:] = 2
    backward(model, geometry, batch)
    geometry.step()  # Σ and the forms are known from here on
    forms = []
    for index, site in enumerate(group.sites):
        if "curvature_penalty" in settings:
            forms.append(0.7 * group.g_cov[index])
        else:
            top = torch.linalg.eigh(group.a_cov[index])[1][:, 2:]
            rest = torch.eye(4) - top @ top.T
            forms.append(0.3 * site.scaling**2 * rest @ site.up.weight.detach().T @ site.up.weight.detach() @ rest)
    backward(model, geometry, batch, accumulate)
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    geometry.detach()

    activations: dict[int, Tensor] = {}
    for index, site in enumerate(group.sites):
        site.down.register_forward_hook(lambda *args, index=index: activations.update({index: args[-1]}))
    model.zero_grad()
    loss = model(**batch).loss
    real = batch["attention_mask"].bool()
    for index, form in enumerate(forms):
        a = activations[index][real]
        loss = loss + 0.5 * ((a @ form) * a).sum() / real.sum()
    loss.backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    for new, old in zip(found, expected, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-6)


def test_statistics_do_not_see_the_penalty_and_off_costs_no_hook(
    make_geometry: Callable[..., Any], random_batch: Callable[..., Any]
) -> None:
    """One adapted layer: with more, the penalty of a later layer is part of the loss that an earlier one sees."""
    batch = random_batch()
    only = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    found = {}
    for weight in (0.0, 5.0):
        settings = {"kfac_update_freq": 1, "kfac_min_samples": 1, "cov_averaging": "mean", "curvature_penalty": weight}
        model, geometry = make_geometry(only, **settings)
        for _ in range(2):
            backward(model, geometry, batch)
            raw = geometry.groups[0].sites[0].down.weight.grad.clone()
            geometry.step()
        found[weight] = (geometry.groups[0].g_cov, raw, float(geometry.penalty))
    torch.testing.assert_close(found[0.0][0], found[5.0][0])
    assert not torch.allclose(found[0.0][1], found[5.0][1])
    assert found[0.0][2] == 0.0
    assert found[5.0][2] > 0.0


def test_the_weights_warm_up_between_two_refreshes_too(
    make_geometry: Callable[..., Any], random_batch: Callable[..., Any]
) -> None:
    batch = random_batch()
    weights: list[float] = []
    model, geometry = make_geometry(
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},  # one layer: no later one's penalty in its gradient
        kfac_update_freq=2,  # the forms stay as they are while the weight goes on rising
        kfac_min_samples=1,
        curvature_penalty=1.0,
        penalty_warmup_steps=4,
    )
    (site,) = geometry.groups[0].sites

    captured: dict[str, Tensor] = {}
    site.down.register_forward_hook(lambda _, inputs, output: captured.update(x=inputs[0], a=output))

    def gradient(loss_scale: float | None) -> Tensor:
        model.zero_grad()
        geometry.start_micro_batch(batch["attention_mask"], (batch["labels"][:, 1:] != -100).sum(), loss_scale)
        model(**batch).loss.backward()
        return site.down.weight.grad.clone()

    for _ in range(7):
        added = gradient(1.0) - gradient(None)
        form = geometry.groups[0].derived.penalty
        if form is None:
            weights.append(float(added.norm()))
        else:
            full = (captured["a"] @ form[0]).flatten(0, -2).T @ captured["x"].flatten(0, -2)
            full = full.detach() / batch["attention_mask"].sum()
            weights.append(float((added * full).sum() / full.square().sum()))
        geometry.finish_micro_batch()
        geometry.step()
    assert weights == pytest.approx([0.0, 0.0, 0.5, 0.75, 1.0, 1.0, 1.0], rel=1e-3)  # no form before step 2's refresh
