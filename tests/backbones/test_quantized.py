"""NF4: which layers are packed and how, gradients of the adapter, GGUF on the way, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from grit_lightning.backbones.adapters import attach_adapter
from grit_lightning.backbones.loading import load_backbone


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_linear_layers_are_packed_in_tensors_of_one_dtype(tiny_backbone_dir: Path, dtype: str) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = load_backbone(tiny_backbone_dir, dtype=dtype, quantization="nf4")
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    assert {layer.weight.quant_state.quant_type for layer in layers} == {"nf4"}
    assert all(layer.weight.quant_state.nested for layer in layers)
    assert {parameter.dtype for parameter in model.parameters()} == {
        getattr(torch, dtype)
    }  # what FSDP needs to flatten them
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_adapter_gradients_are_those_of_the_dequantised_model(
    tiny_backbone_dir: Path, lora_config: Any, batch: dict[str, torch.Tensor]
) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    packed = load_backbone(tiny_backbone_dir, dtype="float32", quantization="nf4")
    dense = load_backbone(tiny_backbone_dir, dtype="float32")
    for name, module in packed.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert not torch.equal(weight, dense.get_submodule(name).weight)  # NF4 does round
            dense.get_submodule(name).weight.data.copy_(weight)

    gradients = []
    for backbone in (packed, dense):
        torch.manual_seed(1)
        model = attach_adapter(backbone, lora_config(init_lora_weights=False))
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        # the same weights in two matrix-multiplication kernels: float32 rounding only
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_gguf_is_quantised_as_the_folder_is(gguf_file: Path, tiny_backbone_dir: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from_gguf = load_backbone(gguf_file, dtype="float32", quantization="nf4")
    from_folder = load_backbone(tiny_backbone_dir, dtype="float32", quantization="nf4")
    expected = dict(from_folder.named_parameters())
    for name, parameter in from_gguf.named_parameters():
        assert torch.equal(parameter.view(torch.uint8), expected[name].view(torch.uint8)), name
    assert from_gguf.name_or_path == str(gguf_file.parent)


def test_instance_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="got a LlamaForCausalLM in memory"):
        load_backbone(tiny_llama, quantization="nf4")


def test_missing_bitsandbytes_names_the_extra(tiny_backbone_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"grit-lightning\[quantized\]"):
        load_backbone(tiny_backbone_dir, quantization="nf4")
