"""Random models of a few thousand weights, one of each family, saved as `save_pretrained` writes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 96
HIDDEN = 32

# The names that most configurations share; `GPT2Config` and some others bring their own.
DECODER: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
GPT2: dict[str, Any] = {
    **{"vocab_size": VOCAB_SIZE, "n_embd": HIDDEN, "n_layer": 1, "n_head": 4, "n_positions": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
VISION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 8},
}

# Name of the configuration without `Config` → what differs from `DECODER`. The head is that of AutoModelForCausalLM.
CAUSAL: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {},
    "Gemma2": {"head_dim": 8},
    "Gemma3Text": {"head_dim": 8},
    "Olmo2": {},
    "Phi3": {},
    "GPT2": GPT2,
    "GPTNeoX": {},
    "Bloom": {},
    "Falcon": {"new_decoder_architecture": False},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "Qwen3Moe": EXPERTS | {"head_dim": 8},
    "DeepseekV3": {
        **{"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        **{
            "first_k_dense_replace": 1,
            "num_hidden_layers": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "num_key_value_heads": 4,
        },
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    },
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "Mamba": {"state_size": 4},
    "Mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "Lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "SmolLM3": {},
    "Cohere2": {},
    "Phi": {},
    "GPTJ": {**GPT2, "rotary_dim": 4},
    "Mpt": {"d_model": HIDDEN, "n_heads": 4, "n_layers": 1, "max_seq_len": 64},
    "Bert": {"is_decoder": False},
}


def _causal(name: str, changes: dict[str, Any]) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**(changes if "n_embd" in changes else DECODER | changes))
    return transformers.AutoModelForCausalLM.from_config(config)


def _t5() -> transformers.PreTrainedModel:
    sizes = {"d_model": HIDDEN, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCAB_SIZE, **sizes))


def _classifier() -> transformers.PreTrainedModel:
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**DECODER, num_labels=3))


def _tied_classifier() -> transformers.PreTrainedModel:
    """Has all that a causal language model needs, since its head would be its embedding."""
    config = transformers.LlamaConfig(**DECODER, num_labels=3, tie_word_embeddings=True)
    return transformers.LlamaForSequenceClassification(config)


def _masked() -> transformers.PreTrainedModel:
    return transformers.BertForMaskedLM(transformers.BertConfig(**DECODER))


def _headless() -> transformers.PreTrainedModel:
    return transformers.LlamaModel(transformers.LlamaConfig(**DECODER))


def _gemma3() -> transformers.PreTrainedModel:
    tokens = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(text_config=DECODER | {"head_dim": 8}, vision_config=VISION, **tokens)
    return transformers.Gemma3ForConditionalGeneration(config)


def _llava() -> transformers.PreTrainedModel:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**DECODER),
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        image_token_index=90,
        image_seq_length=4,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _whisper() -> transformers.PreTrainedModel:
    sizes = {"d_model": HIDDEN, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"max_source_positions": 32, "max_target_positions": 64, "suppress_tokens": None}
    config = transformers.WhisperConfig(vocab_size=VOCAB_SIZE, **sizes, **heads, **tokens, **lengths)
    return transformers.WhisperForConditionalGeneration(config)


def _tied() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, tie_word_embeddings=True))


def _two_layers() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER | {"num_hidden_layers": 2}))


def _wide() -> transformers.PreTrainedModel:
    """As wide as a block of bitsandbytes' 4-bit weights."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**DECODER | {"hidden_size": 64, "intermediate_size": 64})
    )


OTHER: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "Llama with tied embeddings": _tied,
    "T5": _t5,
    "LlamaForSequenceClassification": _classifier,
    "LlamaForSequenceClassification with tied embeddings": _tied_classifier,
    "LlamaModel": _headless,
    "BertForMaskedLM": _masked,
    "Gemma3": _gemma3,
    "Llava": _llava,
    "Whisper": _whisper,
}
WIDE, TWO_LAYERS = "Llama, 64 wide", "Llama, 2 layers"
SPECIAL = {WIDE: _wide, TWO_LAYERS: _two_layers}


class TinyModels:
    """Folders of models that are made when they are asked for, and then read only."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> str:
        folder = self._folder / re.sub(r"\W", "_", name)
        if not folder.exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                make = (OTHER | SPECIAL).get(name) or partial(_causal, name, CAUSAL[name])
                model = make()
                model.float().save_pretrained(folder)
        return str(folder)
