"""The merged model: transformers alone computes what the trained model computes, from a quantised backbone too.

- A merged model has ordinary weights, its tokenizer and no trace of adapter or packing; the module is left as it was.
- Without a tokenizer it says so; without a backbone it cannot be made from a checkpoint.

The tolerance is that of test_adapter.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from grit_lightning import GritLitModule
from grit_lightning.export.adapter import export_adapter

ATOL = 1e-5
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Make = Callable[..., GritLitModule]
Logits = Callable[..., Tensor]
LoraLayers = Callable[..., dict[str, Any]]
Save = Callable[..., Path]
RankOf = Callable[[int, str, int], int]


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("from_checkpoint", [True, False], ids=["checkpoint", "module"])
def test_merged_model_needs_transformers_only(
    quantization: str | None,
    from_checkpoint: bool,
    make_module: Make,
    batch: dict[str, Tensor],
    tmp_path: Path,
    logits: Logits,
    lora_layers: LoraLayers,
    save: Save,
    first_block_empty: RankOf,
) -> None:
    if quantization:
        pytest.importorskip("bitsandbytes")
    module = make_module(rank_of=first_block_empty, quantization=quantization, target_modules=ALL_LINEAR)
    before = logits(module.peft_model, batch)
    export_adapter(save(module, tmp_path / "c.ckpt") if from_checkpoint else module, tmp_path / "out", merge=True)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not lora_layers(merged)
    assert getattr(merged.config, "quantization_config", None) is None
    assert merged.config.use_cache
    torch.testing.assert_close(logits(merged, batch), before, atol=ATOL, rtol=0)
    torch.testing.assert_close(logits(module.peft_model, batch), before, atol=0, rtol=0)  # left as it was
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([40, 41])


def test_gguf_backbone_is_saved_without_its_packing(
    make_module: Make, batch: dict[str, Tensor], tmp_path: Path, logits: Logits
) -> None:
    module = make_module()
    backbone = module.peft_model.get_base_model()
    backbone.config.quantization_config = {"quant_method": "gguf"}  # as some releases leave it
    export_adapter(module, tmp_path / "out", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged, batch), logits(module.peft_model, batch), atol=ATOL, rtol=0)


def test_merged_model_in_memory_has_no_tokenizer_and_says_so(
    tiny_llama: LlamaForCausalLM,
    lora_config: Callable[..., LoraConfig],
    batch: dict[str, Tensor],
    tmp_path: Path,
    logits: Logits,
    save: Save,
    give_ranks: Callable[..., None],
) -> None:
    module = GritLitModule(tiny_llama, lora_config(), geometry=None)
    module.configure_model()
    give_ranks(module)
    with pytest.warns(UserWarning, match="without a tokenizer"):
        export_adapter(module, tmp_path / "out", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, batch), logits(module.peft_model, batch), atol=ATOL, rtol=0)
    with pytest.raises(ValueError, match="expected the name of a backbone to merge into, got none"):
        export_adapter(save(module, tmp_path / "c.ckpt"), tmp_path / "other", merge=True)
    assert not (tmp_path / "other").exists()
