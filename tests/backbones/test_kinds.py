"""Kinds of models: causal language models are taken, every other kind is named in one sentence before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

from grit_lightning.backbones.kinds import require_causal
from grit_lightning.backbones.loading import load_backbone
from grit_lightning.backbones.shapes import empty_backbone

OTHER_KINDS = [
    ("t5", "T5ForConditionalGeneration", "an encoder-decoder"),
    ("bart", "BartForConditionalGeneration", "an encoder-decoder"),
    ("whisper", "WhisperForConditionalGeneration", "an encoder-decoder"),
    ("llama", "LlamaForSequenceClassification", "whose head is for another task"),
    ("qwen2", "Qwen2ForTokenClassification", "whose head is for another task"),
    ("bert", "BertForMaskedLM", "also sees the tokens that it predicts"),
    ("bert", "BertLMHeadModel", "also sees the tokens that it predicts"),
    ("roberta", "RobertaForCausalLM", "also sees the tokens that it predicts"),
    ("modernbert", "ModernBertForMaskedLM", "also sees the tokens that it predicts"),
    ("llama", "LlamaModel", "saved without the head that predicts tokens"),
    ("qwen2_vl", "Qwen2VLForConditionalGeneration", "a model of images and text"),
    ("llava", "LlavaForConditionalGeneration", "a model of images and text"),
    ("clip_vision_model", "CLIPVisionModel", "of the type clip_vision_model"),
]
CAUSAL = [
    ("llama", "LlamaForCausalLM"),
    ("gpt2", "GPT2LMHeadModel"),
    ("gpt2", "GPT2Model"),  # tied: its embeddings are its head
    ("bloom", "BloomForCausalLM"),
    ("falcon", "RWForCausalLM"),  # an older name of the same
    ("mixtral", "MixtralForCausalLM"),
    ("gpt_oss", "GptOssForCausalLM"),
    ("mamba", "MambaForCausalLM"),
    ("gemma3_text", "Gemma3ForCausalLM"),
    ("gemma3", "Gemma3ForConditionalGeneration"),  # of images and text, and loaded for text alone
    ("opt", "OPTForCausalLM"),
]


@pytest.mark.parametrize(("kind", "name", "what"), OTHER_KINDS, ids=lambda value: value)
def test_other_kinds_are_named(kind: str, name: str, what: str) -> None:
    with pytest.raises(ValueError, match=rf"^backbone: expected a causal language model, .* got {name}, .*{what}"):
        require_causal(AutoConfig.for_model(kind), [name])


@pytest.mark.parametrize(("kind", "name"), CAUSAL, ids=lambda value: value)
def test_causal_language_models_are_taken(kind: str, name: str) -> None:
    require_causal(AutoConfig.for_model(kind), [name])
    require_causal(AutoConfig.for_model(kind), [])


def test_a_decoder_of_an_encoders_type_is_taken() -> None:
    require_causal(AutoConfig.for_model("bert", is_decoder=True), ["BertLMHeadModel"])


def test_a_folder_of_another_kind_is_refused_before_its_weights_are_read(make_tiny_llama: Any, tmp_path: Path) -> None:
    make_tiny_llama().config.save_pretrained(tmp_path)
    changed = AutoConfig.from_pretrained(tmp_path)
    changed.architectures = ["LlamaForSequenceClassification"]
    changed.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never opened")
    for load in (load_backbone, empty_backbone):
        with pytest.raises(ValueError, match="LlamaForSequenceClassification, whose head is for another task"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("LlamaForSequenceClassification", "whose head is for another task"),
        ("LlamaModel", "saved without the head that predicts tokens"),
    ],
)
def test_a_model_in_memory_of_another_kind_is_refused(make_tiny_llama: Any, name: str, what: str) -> None:
    model = getattr(transformers, name)(make_tiny_llama().config)
    with pytest.raises(ValueError, match=rf"^backbone: expected a causal language model, .* got {name}, .*{what}"):
        load_backbone(model)


def test_a_base_model_in_memory_has_no_head_even_if_its_embeddings_are_tied(make_tiny_llama: Any) -> None:
    model = transformers.LlamaModel(make_tiny_llama(tie_word_embeddings=True).config)
    with pytest.raises(ValueError, match="got LlamaModel, which has no head that predicts tokens"):
        load_backbone(model)


def test_an_encoder_decoder_in_memory_is_refused() -> None:
    config = transformers.T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration, an encoder-decoder"):
        load_backbone(transformers.T5ForConditionalGeneration(config))
