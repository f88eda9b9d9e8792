"""The exported adapter: plain PEFT computes with it what the trained model computes, from less.

- Logits are the same for every kind of LoRA configuration, from the module and from its checkpoint, merged by PEFT and not.
- File and parameters shrink to the effective ranks, without patterns where those are uniform.
- Layers that learnt nothing are left out, or kept at rank 1; whole trained modules travel along.
- PEFT needs none of this package, and names the backbone for the hub if it is from there.

Tolerance: both sides run the same float32 formula on the same numbers. Only the order of the sums over the rank differs,
which moves logits of size 1 by some 1e-7; 1e-5 leaves room for other kernels, and every fault moves them by 1e-2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from grit_lightning import GritLitModule
from grit_lightning.export.adapter import export_adapter

ATOL = 1e-5
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Make = Callable[..., GritLitModule]
Logits = Callable[..., Tensor]
LoraLayers = Callable[..., dict[str, Any]]
Save = Callable[..., Path]
Edit = Callable[..., Path]
RankOf = Callable[[int, str, int], int]


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16},
    "alpha that no rank divides": {"r": 7, "lora_alpha": 5},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True},
    "source patterns": {"r": 4, "rank_pattern": {"q_proj": 8, "1.mlp.up_proj": 3}, "alpha_pattern": {"v_proj": 1}},
    "rslora and source patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 7},
        "alpha_pattern": {"o_proj": 3},
        "use_rslora": True,
    },
    "regular expression": {"r": 4, "target_modules": r".*\.1\..*(q|v)_proj"},
    "all-linear": {"r": 4, "target_modules": "all-linear"},
}


@pytest.mark.parametrize("lora", ADAPTERS.values(), ids=ADAPTERS.keys())
@pytest.mark.parametrize("from_checkpoint", [True, False], ids=["checkpoint", "module"])
def test_plain_peft_computes_what_the_trained_model_computes(
    lora: dict[str, Any],
    from_checkpoint: bool,
    make_module: Make,
    tiny_llama: LlamaForCausalLM,
    batch: dict[str, Tensor],
    tmp_path: Path,
    logits: Logits,
    lora_layers: LoraLayers,
    save: Save,
) -> None:
    module = make_module(**({"target_modules": ALL_LINEAR} | lora))
    assert module.geometry is not None
    trained = {name: layer.scaling["default"] for name, layer in lora_layers(module.peft_model).items()}
    ranks = module.geometry.ranks
    export_adapter(save(module, tmp_path / "c.ckpt") if from_checkpoint else module, tmp_path / "out")

    plain = logits(tiny_llama, batch)
    loaded = PeftModel.from_pretrained(tiny_llama, tmp_path / "out")
    expected = logits(module.peft_model, batch)
    assert (expected - plain).abs().max() > 1e-2, "an adapter that does nothing would prove nothing"
    torch.testing.assert_close(logits(loaded, batch), expected, atol=ATOL, rtol=0)

    layers = lora_layers(loaded)
    for name, layer in layers.items():
        assert torch.tensor(layer.scaling["default"]).equal(torch.tensor(trained[name])), "the same float32"
    assert {
        f"base_model.model.{name}": layer.lora_A["default"].weight.shape[0] for name, layer in layers.items()
    } == ranks
    assert len(set(ranks.values())) > 1

    torch.testing.assert_close(logits(loaded.merge_and_unload(), batch), expected, atol=ATOL, rtol=0)


def test_peft_alone_in_a_process_of_its_own(
    checkpoint: Path, batch: dict[str, Tensor], tmp_path: Path, logits: Logits
) -> None:
    """The process never imports this package, and PEFT has nothing to warn about."""
    export_adapter(checkpoint, tmp_path / "out")
    module = GritLitModule.load_from_checkpoint(checkpoint, weights_only=True)
    save_file({"input_ids": batch["input_ids"], "mask": batch["attention_mask"]}, tmp_path / "in.safetensors")
    program = f"""
import sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}).eval()  # finds the backbone by itself
inputs = load_file({str(tmp_path / "in.safetensors")!r})
logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["mask"]).logits.detach()
assert not [name for name in sys.modules if name.partition(".")[0] == "grit_lightning"]
save_file({{"logits": logits.contiguous()}}, {str(tmp_path / "result.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    module.configure_model()
    torch.testing.assert_close(
        load_file(tmp_path / "result.safetensors")["logits"], logits(module.peft_model, batch), atol=ATOL, rtol=0
    )


def test_file_and_parameters_shrink_to_the_effective_ranks(
    make_module: Make, tiny_llama: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = make_module(rank_of=lambda index, name, r: 2, r=16, target_modules=ALL_LINEAR)
    module.peft_model.save_pretrained(str(tmp_path / "full"))
    adapter = export_adapter(module, tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny_llama, tmp_path / "out", is_trainable=True)

    assert module.geometry is not None
    small, full = module.geometry.effective_parameters, module.geometry.trainable_parameters
    assert full == 8 * small
    assert (adapter.parameters, adapter.parameters_before) == (small, full)
    assert loaded.get_nb_trainable_parameters()[0] == small
    loaded.print_trainable_parameters()
    assert f"trainable params: {small:,} " in capsys.readouterr().out
    header = 5_000  # bytes: names and shapes, the same for both
    sizes = {name: (tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("full", "out")}
    assert sizes["out"] < 4 * small + header < sizes["full"]


def test_uniform_rank_needs_no_patterns(make_module: Make, tmp_path: Path) -> None:
    export_adapter(make_module(rank_of=lambda index, name, r: 3), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 6, {}, {})
    assert config["inference_mode"] is True


def test_whole_trained_modules_travel_with_the_adapter(
    make_module: Make, tiny_llama: LlamaForCausalLM, batch: dict[str, Tensor], tmp_path: Path, logits: Logits
) -> None:
    module = make_module(modules_to_save=["lm_head"])
    module.peft_model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    expected = logits(module.peft_model, batch)
    export_adapter(module, tmp_path / "adapter")
    export_adapter(module, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(tiny_llama, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, batch), expected, atol=ATOL, rtol=0)
    torch.testing.assert_close(logits(merged, batch), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("exclude", [None, ["1.self_attn.v_proj"], r".*\.1\.self_attn\.v_proj"])
def test_layers_without_rank_are_left_out(
    exclude: Any,
    make_module: Make,
    tiny_llama: LlamaForCausalLM,
    batch: dict[str, Tensor],
    tmp_path: Path,
    logits: Logits,
    lora_layers: LoraLayers,
    first_block_empty: RankOf,
) -> None:
    module = make_module(rank_of=first_block_empty, exclude_modules=exclude)
    adapter = export_adapter(module, tmp_path / "out")
    assert not [name for name in load_file(tmp_path / "out" / "adapter_model.safetensors") if "layers.0" in name]
    assert adapter.ranks["model.layers.0.self_attn.q_proj"] == 0
    loaded = PeftModel.from_pretrained(tiny_llama, tmp_path / "out")
    assert sorted(lora_layers(loaded)) == [name for name, rank in sorted(adapter.ranks.items()) if rank]
    torch.testing.assert_close(logits(loaded, batch), logits(module.peft_model, batch), atol=ATOL, rtol=0)


def test_keep_empty_floors_them_to_one(
    make_module: Make,
    tiny_llama: LlamaForCausalLM,
    batch: dict[str, Tensor],
    tmp_path: Path,
    logits: Logits,
    lora_layers: LoraLayers,
    first_block_empty: RankOf,
) -> None:
    module = make_module(rank_of=first_block_empty)
    adapter = export_adapter(module, tmp_path / "out", keep_empty=True)
    assert min(adapter.ranks.values()) == 1
    loaded = PeftModel.from_pretrained(tiny_llama, tmp_path / "out")
    assert len(lora_layers(loaded)) == 4
    torch.testing.assert_close(logits(loaded, batch), logits(module.peft_model, batch), atol=ATOL, rtol=0)


@pytest.mark.parametrize(("revision", "load"), [(None, "'some/model'"), ("abc", "'some/model', revision='abc'")])
def test_hub_backbone_is_named_for_the_hub(
    revision: str | None, load: str, checkpoint: Path, tmp_path: Path, edit: Edit
) -> None:
    settings = {"backbone": "some/model", "revision": revision, "quantization": "nf4"}
    edit(checkpoint, lambda content: content["grit"]["model"].update(settings))
    export_adapter(checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/model", revision)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(readme.split("---")[1])["base_model"] == "some/model"
    assert f"AutoModelForCausalLM.from_pretrained({load})" in readme
    assert "on `some/model` (nf4) for 7 optimizer steps" in readme


def test_a_checkpoint_that_does_not_name_its_model_is_one_of_grit_lit_module(
    checkpoint: Path, tmp_path: Path, edit: Edit
) -> None:
    """As early ones do, whose hyperparameters say what was adapted."""
    export_adapter(checkpoint, tmp_path / "new")
    edit(checkpoint, lambda content: content["grit"].pop("model"))
    export_adapter(checkpoint, tmp_path / "early")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "early" / name).read_bytes()
