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

from grit_lightning import GeometryConfig, RankSpaceGeometry
from grit_lightning.optimizers import EigenbasisAdam

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


@pytest.mark.filterwarnings("ignore:trainer.precision")
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_true_half_precision_rounds_no_state_of_the_geometry(
    precision: Any, make_module: Any, random_batch: Any, fit: Any, truth: Any, assert_agrees: Any
) -> None:
    """Under torch's default dtype of that precision, in which Lightning builds and runs the model."""
    dtype, tolerance = {"bf16-true": (torch.bfloat16, BF16), "16-true": (torch.float16, FP16)}[precision]
    batches = [random_batch(batch=2, length=12, pad=[0, 4], seed=seed) for seed in range(3)]
    config = GeometryConfig(kfac_update_freq=1, kfac_min_samples=1, cov_averaging="mean", curvature_penalty=0.1)
    module = make_module(geometry=config, optimizer=EigenbasisAdam, dtype=str(dtype).removeprefix("torch."))
    module.to(dtype)
    expected = truth(module.peft_model, batches)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        module.geometry = module.hooks.steps.geometry = RankSpaceGeometry(module.peft_model, config)
    finally:
        torch.set_default_dtype(default)
    module.optimizer_factory = lambda parameters: EigenbasisAdam(parameters, lr=0.0)
    fit(module, batches, precision=precision)
    assert_agrees(module.geometry, expected, a=tolerance, g=tolerance)
    for group in module.geometry.groups:
        tensors = [group.statistics.gradient_gram, *group.derived._tensors().values()]
        for part in (group.statistics.micro, group.statistics.window, group.statistics.local, group.statistics.total):
            tensors += part.tensors()
        assert {tensor.dtype for tensor in tensors} <= {torch.float32, torch.bool}
    (optimizer,) = module.trainer.optimizers
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    assert {value.dtype for value in state} == {torch.float32}
    assert {p.dtype for p in module.parameters()} == {dtype}  # as the Trainer was asked for


@pytest.mark.filterwarnings("ignore:trainer.precision")
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_true_half_precision_counts_tokens_exactly(
    precision: Any, make_module: Any, random_batch: Any, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither 1 / 3 nor 3 · 1,001 is a number of half precision."""
    module, scales = make_module(), []
    monkeypatch.setattr(module.geometry, "start_micro_batch", lambda mask, scale, *_: scales.append(float(scale)))
    monkeypatch.setattr(module.geometry, "step", lambda **_: None)
    fit(module, [random_batch(batch=11, length=92)] * 3, precision=precision, accumulate_grad_batches=3)
    assert scales == pytest.approx([3 * 11 * 91] * 3, rel=1e-6)


def test_true_half_precision_says_that_it_rounds_the_adapter(make_module: Any, random_batch: Any, fit: Any) -> None:
    with pytest.warns(UserWarning, match=r"trainer\.precision: bf16-true .* 1/256 .* model\.dtype to bfloat16"):
        fit(make_module(), [random_batch()], precision="bf16-true")


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
