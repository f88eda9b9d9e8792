"""Number formats and scales must not show in the statistics beyond their own rounding.

Tolerances are relative Frobenius errors of a whole covariance. One rounding to fp16 is off by up to 2⁻¹¹ = 0.05%, to
bf16 by up to 2⁻⁸ = 0.4%; a gradient has passed about ten of them on its way through two layers, and a covariance holds
it twice. That makes 1% and 8%. Accumulation itself is in float32 and adds nothing that would show.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.amp import GradScaler

from grit_lightning import GeometryConfig

FP16, BF16 = 1e-2, 8e-2


def assert_not_constant(covariance: Tensor) -> None:
    """Fails for zero and for any multiple of I: a constant would not precondition."""
    mean = covariance.diagonal().mean()
    assert float(mean) > 0
    assert float((covariance / mean - torch.eye(len(covariance))).norm()) > 0.5


@pytest.mark.parametrize("scale", [2.0**8, 2.0**16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fp16_with_a_grad_scaler(
    scale: float, accumulate: int, make_module: Any, random_batch: Any, fit: Any, truth: Any, assert_agrees: Any
) -> None:
    batches = [random_batch(batch=2, length=12, pad=[0, 4], seed=seed) for seed in range(2)]
    module = make_module()
    expected = truth(module.peft_model, batches)
    precision = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=scale))
    fit(module, batches, plugins=[precision], accumulate_grad_batches=accumulate)
    assert module.geometry.counters["rejected"] == 0
    assert_agrees(module.geometry, expected, a=FP16, g=FP16)
    for view in module.geometry:
        assert_not_constant(view.g_cov)


@pytest.mark.parametrize("setting", [{"precision": "bf16-mixed"}, {"dtype": "bfloat16"}], ids=["mixed", "backbone"])
def test_bf16(
    setting: dict[str, Any], make_module: Any, random_batch: Any, fit: Any, truth: Any, assert_agrees: Any
) -> None:
    batch = random_batch(batch=4, length=12, pad=[0, 4, 1, 7])
    module = make_module(**({"dtype": setting["dtype"]} if "dtype" in setting else {}))
    expected = truth(module.peft_model, [batch])  # of the weights as rounded to bf16
    fit(module, [batch], **({"precision": setting["precision"]} if "precision" in setting else {}))
    assert_agrees(module.geometry, expected, a=BF16, g=BF16)
    for view in module.geometry:
        assert view.a_cov.dtype == view.g_cov.dtype == torch.float32
        assert_not_constant(view.g_cov)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-mixed"])
@pytest.mark.parametrize("weight", [1e-9, 1e-16])
def test_tiny_gradients_keep_their_covariance_and_their_preconditioned_step(
    autocast: bool, weight: float, make_module: Any, random_batch: Any, truth: Any, measure: Any, assert_agrees: Any
) -> None:
    module = make_module(geometry=None)
    model, batch = module.peft_model, random_batch(batch=2, length=12)
    expected = {name: (a, g * weight**2) for name, (a, g) in truth(model, [batch]).items()}
    (weight * model(**batch).loss).backward()
    raw = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    lower = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with lower:
        geometry = measure(model, [batch], config=GeometryConfig(kfac_update_freq=1, kfac_min_samples=1), weight=weight)
    largest = max(float(view.g_cov.diagonal().max()) for view in geometry) ** 0.5
    assert largest < 1e3 * weight  # 1e-12 and below
    rounding = BF16 if autocast else 1e-4
    assert_agrees(geometry, expected, a=rounding, g=rounding)
    for view in geometry:
        assert_not_constant(view.g_cov)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # grafting gives every preconditioned gradient the length of the raw one
            ratio = float(parameter.grad.double().norm() / raw[name].double().norm())
            assert ratio == pytest.approx(1.0, rel=rounding), name
            assert not torch.allclose(parameter.grad, raw[name], rtol=0.1, atol=0)
