"""Backbones of every kind: a GGUF file, a hub cache, and a small batch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM


def _write_gguf(model: LlamaForCausalLM, path: Path) -> Path:
    """Writes a Llama as llama.cpp lays it out: own tensor names, and the rotary halves of q and k interleaved."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "<s>", "</s>", "a", "b", "ab", *(f"<{i}>" for i in range(6, config.vocab_size))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        head_count = heads.get(name.split(".")[-2])
        if head_count is not None:
            halves = weight.reshape(head_count, 2, -1, weight.shape[-1])
            weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def fill_hub_cache(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Path], None]:
    """Puts a copy of a folder where huggingface_hub looks for acme/tiny, as revisions main and v1."""

    def fill(cache: Path, folder: Path) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = cache / "models--acme--tiny"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        for ref in ("main", "v1"):
            (repository / "refs" / ref).write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    return fill


@pytest.fixture
def gguf_file(make_tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    return _write_gguf(make_tiny_llama(), tmp_path / "tiny.gguf")


@pytest.fixture
def batch(random_batch: Callable[..., dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return random_batch(2, 12, pad=[0, 3])
