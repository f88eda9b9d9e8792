"""Adapters of every kind: what was trained is what is saved, resumed, exported and merged, whatever PEFT method it is.

- The checkpoint, read by a module that was made under other random numbers, computes what was trained, to the bit.
- The export, loaded by plain PEFT on a fresh backbone, computes it too, and so does the merged model.
- What can be sliced is; what cannot is written as PEFT itself would write it, and says why.
- A start that moves the backbone in a way that cannot be undone is refused before training.

Tolerance as in test_adapter.py; a start that moves the backbone is put back in float32, which moves logits by some 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from grit_lightning import GritLitModule
from grit_lightning.export.adapter import export_adapter

ATOL = 2e-5
Q = {"target_modules": ["q_proj", "v_proj"]}

SLICED: dict[str, PeftConfig] = {
    "pissa": LoraConfig(r=4, init_lora_weights="pissa", **Q),
    "pissa by random SVD": LoraConfig(r=4, init_lora_weights="pissa_niter_2", lora_alpha=3, use_rslora=True, **Q),
    "olora": LoraConfig(r=4, init_lora_weights="olora", rank_pattern={"q_proj": 3}, **Q),
    "dora": LoraConfig(r=4, use_dora=True, **Q),
    "dora from pissa": LoraConfig(r=4, use_dora=True, init_lora_weights="pissa", **Q),
    "bias all": LoraConfig(r=4, bias="all", **Q),
    "bias of LoRA only": LoraConfig(r=4, bias="lora_only", **Q),
    "trained tokens": LoraConfig(r=4, trainable_token_indices=[3, 5], **Q),
    "tied head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
    "whole embedding": LoraConfig(r=4, modules_to_save=["embed_tokens"], **Q),
    "whole embedding, tied": LoraConfig(r=4, modules_to_save=["embed_tokens"], ensure_weight_tying=True, **Q),
    "mica": LoraConfig(r=4, init_lora_weights="mica", **Q),
}
WHOLE: dict[str, PeftConfig] = {
    "embedding": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "bias in B": LoraConfig(r=4, lora_bias=True, **Q),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": peft.AdaLoraConfig(init_r=4, total_step=10, **Q),
    "loha": peft.LoHaConfig(r=4, **Q),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "layer norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
}
UNMERGED: dict[str, PeftConfig] = {
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning"),
    pytest.mark.filterwarnings("ignore:The merged model is written without a tokenizer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape"),  # biases of B
]

Logits = Callable[..., Tensor]
Save = Callable[..., Path]


@pytest.fixture
def backbone(make_tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    """A Llama with biases whose head is tied to its embedding."""
    make_tiny_llama(attention_bias=True, tie_word_embeddings=True).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def trained(backbone: Path, adapter: PeftConfig, seed: int = 0) -> GritLitModule:
    torch.manual_seed(seed)
    module = GritLitModule(str(backbone), adapter, geometry=None, dtype="float32")
    module.configure_model()
    for name, parameter in module.peft_model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
            if "lora_B" in name and parameter.ndim == 2:
                parameter.data[:, 2:] *= 0.0 if getattr(adapter, "init_lora_weights", False) is True else 1.0
    return module


@pytest.mark.parametrize("adapter", (ALL := SLICED | WHOLE | UNMERGED).values(), ids=ALL.keys())
def test_what_was_trained_comes_back(
    adapter: PeftConfig, backbone: Path, batch: dict[str, Tensor], tmp_path: Path, logits: Logits, save: Save
) -> None:
    module = trained(backbone, adapter)
    expected = logits(module.peft_model, batch)
    checkpoint = save(module, tmp_path / "c.ckpt")

    torch.manual_seed(99)
    resumed = GritLitModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert logits(resumed.peft_model, batch).equal(expected)

    for source, name in ((module, "module"), (checkpoint, "checkpoint")):
        exported = export_adapter(source, tmp_path / name)
        assert bool(exported.whole) == (adapter not in SLICED.values())
        fresh = AutoModelForCausalLM.from_pretrained(backbone)
        assert not torch.allclose(logits(fresh, batch), expected[:, -batch["input_ids"].shape[1] :], atol=1e-3)
        loaded = PeftModel.from_pretrained(fresh, tmp_path / name)
        torch.testing.assert_close(logits(loaded, batch), expected, atol=ATOL, rtol=0)

        if adapter in UNMERGED.values():
            with pytest.raises(ValueError, match=r"--merge: expected an adapter that can become a part of the weights"):
                export_adapter(source, tmp_path / f"{name}-merged", merge=True)
            continue
        export_adapter(source, tmp_path / f"{name}-merged", merge=True)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged")
        torch.testing.assert_close(logits(merged, batch), expected, atol=ATOL, rtol=0)
    assert logits(module.peft_model, batch).equal(expected), "the module is left as it was"


@pytest.mark.parametrize("adapter", WHOLE.values(), ids=WHOLE.keys())
def test_an_adapter_that_is_not_sliced_is_what_peft_writes(
    adapter: PeftConfig, backbone: Path, tmp_path: Path, save: Save
) -> None:
    module = trained(backbone, adapter)
    exported = export_adapter(save(module, tmp_path / "c.ckpt"), tmp_path / "out")
    module.peft_model.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert exported.whole in (tmp_path / "out" / "README.md").read_text()


REFUSED: dict[str, tuple[LoraConfig, str | None, str]] = {
    "replaced weights": (LoraConfig(r=4, kasa_config=peft.KasaConfig(), **Q), None, "got True, which replaces"),
    "packed weights": (SLICED["pissa"], "nf4", "as its weights are quantised, got 'pissa'"),
    "shared weights": (
        LoraConfig(r=4, init_lora_weights="olora", target_modules=["lm_head"]),
        None,
        "which it shares with another layer, got 'olora'",
    ),
    "views": (
        LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
        None,
        "ensure_weight_tying: expected false where layers are adapted, got true",
    ),
}


@pytest.mark.parametrize(("adapter", "quantization", "complaint"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_checkpoint_could_give_back_is_refused_before_training(
    adapter: LoraConfig, quantization: str | None, complaint: str, backbone: Path
) -> None:
    if quantization:
        pytest.importorskip("bitsandbytes")
    module = GritLitModule(str(backbone), adapter, geometry=None, quantization=quantization)
    with pytest.raises(ValueError, match=complaint):
        module.configure_model()


def test_another_start_is_refused_on_resume(backbone: Path, tmp_path: Path, save: Save) -> None:
    module = trained(backbone, SLICED["pissa"])
    for value in module.hooks.steps.packer.start.values():
        value.mul_(1.1)
    with pytest.raises(ValueError, match="expected the start that the checkpoint was trained from"):
        GritLitModule.load_from_checkpoint(save(module, tmp_path / "c.ckpt"), weights_only=True)


def test_a_frozen_factor_is_saved(
    backbone: Path, batch: dict[str, Tensor], tmp_path: Path, logits: Logits, save: Save
) -> None:
    module = trained(backbone, LoraConfig(r=4, **Q))
    for name, parameter in module.peft_model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)  # as LoRA-FA does when its optimizer is made
    expected = logits(module.peft_model, batch)
    checkpoint = save(module, tmp_path / "c.ckpt")
    assert logits(GritLitModule.load_from_checkpoint(checkpoint, weights_only=True).peft_model, batch).equal(expected)
    export_adapter(checkpoint, tmp_path / "out")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), tmp_path / "out")
    torch.testing.assert_close(logits(loaded, batch), expected, atol=ATOL, rtol=0)
