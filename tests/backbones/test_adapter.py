"""The adapter on a backbone: float32 and trainable, on any architecture, recomputed or not, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from grit_lightning.backbones.adapters import attach_adapter
from grit_lightning.backbones.loading import load_backbone

VOCAB_SIZE = 320


def test_adapter_is_float32_trainable_and_in_training_mode(tiny_backbone_dir: Path, lora_config: Any) -> None:
    config = lora_config(target_modules="all-linear")
    model = attach_adapter(load_backbone(tiny_backbone_dir, dtype="bfloat16"), config)
    assert isinstance(model, PeftModel)
    assert model.training
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 7 * 2
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    assert config.target_modules == "all-linear"  # the caller's object serves the next model, too


def test_any_peft_config_is_accepted(tiny_llama: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> None:
    adapter = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    model = attach_adapter(load_backbone(tiny_llama), adapter)
    model(**batch).loss.backward()
    assert sum(p.grad is not None for p in model.parameters()) == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gpt2_conv1d(batch: dict[str, torch.Tensor], checkpointing: bool) -> None:
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0)
    backbone = load_backbone(GPT2LMHeadModel(config).float(), gradient_checkpointing=checkpointing)
    adapter = LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = attach_adapter(backbone, adapter)
    model(**batch).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if n.endswith("lora_B.default.weight")}
    assert len(gradients) == 2
    assert all(g.shape == (96, 3) and g.abs().max() > 0 for g in gradients.values())


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["no_proj"], "no_proj"),
        (["q_proj", "no_proj"], r"\['no_proj'\]"),
        (["proj"], "proj"),
        (r".*\.no_proj", "no_proj"),
    ],
)
def test_target_that_matches_nothing_lists_the_layers(
    tiny_llama: LlamaForCausalLM, lora_config: Any, targets: Any, named: str
) -> None:
    suffixes = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ValueError, match=f"{named}.*linear layers: {suffixes}"):
        attach_adapter(tiny_llama, lora_config(target_modules=targets))
    assert isinstance(attach_adapter(tiny_llama, lora_config()), PeftModel)  # nothing was left half-attached


def test_target_that_is_no_linear_layer(tiny_llama: LlamaForCausalLM, lora_config: Any) -> None:
    with pytest.raises(ValueError, match=r"LlamaRMSNorm.*not supported.*linear layers: down_proj"):
        attach_adapter(tiny_llama, lora_config(target_modules=["norm"]))


@pytest.mark.parametrize("rank", [0, -4])
def test_rank_must_be_positive(tiny_llama: LlamaForCausalLM, lora_config: Any, rank: int) -> None:
    with pytest.raises(ValueError, match=f"adapter.r: expected a positive rank, got {rank}"):
        attach_adapter(tiny_llama, lora_config(r=rank))
    with pytest.raises(ValueError, match=rf"rank_pattern\['q_proj'\]: expected a positive rank, got {rank}"):
        attach_adapter(tiny_llama, lora_config(rank_pattern={"q_proj": rank}))


def test_second_adapter_is_refused(tiny_llama: LlamaForCausalLM, lora_config: Any) -> None:
    adapted = attach_adapter(tiny_llama, lora_config())
    for model in (tiny_llama, adapted):
        with pytest.raises(ValueError, match="expected a model without an adapter, got one that already carries"):
            attach_adapter(model, lora_config())


# Gradient checkpointing.


def test_gradients_are_the_same_and_layers_run_twice(
    make_tiny_llama: Callable[..., LlamaForCausalLM], lora_config: Any, batch: dict[str, torch.Tensor]
) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        backbone = load_backbone(make_tiny_llama(), gradient_checkpointing=checkpointing)
        model = attach_adapter(backbone, lora_config(init_lora_weights=False))
        seen: list[int] = []
        backbone.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        calls.append(len(seen))
        with torch.inference_mode():
            assert model.eval()(**batch).loss.isfinite()
    assert calls == [1, 2]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_frozen_backbone_has_no_gradient(
    tiny_llama: LlamaForCausalLM, lora_config: Any, batch: dict[str, torch.Tensor]
) -> None:
    model = attach_adapter(load_backbone(tiny_llama, gradient_checkpointing=True), lora_config())
    model(**batch).loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
