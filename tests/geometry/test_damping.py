"""Damping modes and the trust clip, as the geometry applies them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from grit_lightning import GeometryConfig, RankSpaceGeometry
from grit_lightning.backbones.adapters import attach_adapter
from grit_lightning.backbones.loading import load_backbone
from grit_lightning.geometry.quantization import relative_quantization_noise

bitsandbytes = pytest.importorskip("bitsandbytes", reason="NF4 layers come from bitsandbytes")


def inverse_of_sigma_a(model: PeftModel, steps: int, batch: dict[str, Tensor], **config: Any) -> tuple[Tensor, Tensor]:
    """(Σ_a, its damped inverse) of every layer, in float64, after some steps over one batch."""
    geometry = RankSpaceGeometry(model, GeometryConfig(kfac_update_freq=1, kfac_min_samples=1, **config))
    for _ in range(steps):
        model.zero_grad()
        geometry.start_micro_batch(batch["attention_mask"], (batch["labels"][:, 1:] != -100).sum())
        model(**batch).loss.backward()
        geometry.finish_micro_batch()
        geometry.step()
    geometry.detach()
    (group,) = geometry.groups
    return group.a_cov.double(), group.derived.a_inverse.double()


def damping_used(a_cov: Tensor, inverse: Tensor) -> Tensor:
    """Mean λ of each layer, read back from the inverse."""
    return (torch.linalg.inv(inverse) - a_cov).diagonal(dim1=-2, dim2=-1).mean(-1)


@pytest.fixture
def model(make_tiny_llama: Callable[..., Any], lora_config: Callable[..., Any]) -> PeftModel:
    return get_peft_model(make_tiny_llama(), lora_config())


def test_relative_damping_scales_with_the_mean_eigenvalue(model: PeftModel, random_batch: Callable[..., Any]) -> None:
    a_cov, inverse = inverse_of_sigma_a(model, 1, random_batch(), damping_mode="relative", kfac_damping=0.5)
    expected = 0.5 * a_cov.diagonal(dim1=-2, dim2=-1).mean(-1)
    torch.testing.assert_close(damping_used(a_cov, inverse), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("reference", "factor"), [(16, 1.0), (32, 1.0), (320, 10.0)])
def test_batch_aware_damping_grows_as_steps_get_smaller(
    model: PeftModel, random_batch: Callable[..., Any], reference: int, factor: float
) -> None:
    config = {"damping_mode": "batch_aware", "kfac_damping": 0.1, "damping_reference_tokens": reference}
    a_cov, inverse = inverse_of_sigma_a(model, 3, random_batch(batch=2, length=16), **config)  # 32 tokens a step
    torch.testing.assert_close(
        damping_used(a_cov, inverse), torch.full((4,), 0.1 * factor, dtype=torch.float64), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("every", [2, 3])
def test_batch_aware_damping_counts_the_tokens_of_micro_batches_that_are_not_measured(
    model: PeftModel, random_batch: Callable[..., Any], every: int
) -> None:
    settings = {"damping_mode": "batch_aware", "kfac_damping": 0.1, "damping_reference_tokens": 320}
    a_cov, inverse = inverse_of_sigma_a(model, 7, random_batch(batch=2, length=16), cov_update_freq=every, **settings)
    torch.testing.assert_close(
        damping_used(a_cov, inverse), torch.full((4,), 0.1 * 10, dtype=torch.float64), rtol=1e-3, atol=0
    )


def test_quantization_aware_damping_adds_the_measured_noise(
    tiny_backbone_dir: Path, lora_config: Callable[..., Any], random_batch: Callable[..., Any], model: PeftModel
) -> None:
    nf4 = attach_adapter(load_backbone(tiny_backbone_dir, quantization="nf4"), lora_config())
    settings = {"damping_mode": "quantization_aware", "kfac_damping": 0.1}
    a_cov, inverse = inverse_of_sigma_a(nf4, 1, random_batch(), **settings)
    noise = torch.tensor(
        [relative_quantization_noise(m.base_layer) for _, m in nf4.named_modules() if hasattr(m, "lora_A")]
    )
    expected = 0.1 + noise * a_cov.diagonal(dim1=-2, dim2=-1).mean(-1)
    torch.testing.assert_close(damping_used(a_cov, inverse), expected, rtol=1e-3, atol=0)
    a_cov, inverse = inverse_of_sigma_a(model, 1, random_batch(), **settings)
    torch.testing.assert_close(
        damping_used(a_cov, inverse), torch.full((4,), 0.1, dtype=torch.float64), rtol=1e-3, atol=0
    )


def test_measured_noise_is_close_to_the_true_error_of_nf4() -> None:
    weight = 0.02 * torch.randn(256, 512)
    quantized, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = weight - bitsandbytes.functional.dequantize_4bit(quantized, state)
    truth = float(error.square().sum() / weight.square().sum())
    layer = bitsandbytes.nn.Linear4bit(512, 256, bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight = bitsandbytes.nn.Params4bit(quantized, requires_grad=False, quant_state=state, bnb_quantized=True)
    assert relative_quantization_noise(layer) == pytest.approx(truth, rel=0.25)
    assert 0.005 < truth < 0.02
    assert relative_quantization_noise(nn.Linear(4, 4)) == 0.0


def test_the_trust_clip_bounds_growth_and_leaves_shrinking_alone(
    model: PeftModel, random_batch: Callable[..., Any]
) -> None:
    norms: dict[float | None, list[float]] = {}
    batch = random_batch()
    for clip in (None, 2.0):
        config = GeometryConfig(
            kfac_update_freq=1, kfac_min_samples=1, damping_mode="absolute", grafting=False, trust_clip=clip
        )
        geometry = RankSpaceGeometry(model, config)
        model.zero_grad()
        geometry.start_micro_batch(batch["attention_mask"], (batch["labels"][:, 1:] != -100).sum())
        model(**batch).loss.backward()
        raw = [float(site.up.weight.grad.norm()) for site in geometry.groups[0].sites]
        geometry.finish_micro_batch()
        geometry.step()
        norms[clip] = [float(s.up.weight.grad.norm()) / n for s, n in zip(geometry.groups[0].sites, raw, strict=True)]
        geometry.detach()
    assert max(norms[None]) > 2.0
    for free, clipped in zip(norms[None], norms[2.0], strict=True):
        assert clipped == pytest.approx(min(free, 2.0), rel=1e-4)
