"""Names and numbers in an adapter's configuration that the model does not have, though others of the same setting it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, TrainableTokensConfig
from transformers import LlamaForCausalLM

from grit_lightning.backbones.adapters import attach_adapter


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_proj", "v_porj"]},
            r"target_modules: .*\['v_porj'\] match none\. Did you mean v_proj\?",
        ),
        ({"target_modules": ["layers.7.self_attn.q_proj", "v_proj"]}, r"target_modules: .*\['layers\.7\.self_attn"),
        ({"modules_to_save": ["lm_head", "embed_tokns"]}, r"modules_to_save: .* Did you mean embed_tokens\?"),
        ({"modules_to_save": ["head"]}, r"modules_to_save: .*\['head'\] match none"),  # PEFT would take lm_head
        ({"exclude_modules": ["layers.0.self_attn.q_prj"]}, r"exclude_modules: .* Did you mean .*q_proj\?"),
        ({"exclude_modules": r".*\.9\..*"}, r"exclude_modules: expected a regular expression .*, which matches none"),
        (
            {"layers_to_transform": [1, 99]},
            r"layers_to_transform: .* from 0 to 1, got \[1, 99\], of which \[99\] are none",
        ),
        ({"layers_to_transform": 2}, r"layers_to_transform: .* got \[2\]"),
        (
            {"layers_to_transform": [1], "layers_pattern": ["layer"]},
            r"layers_pattern: .*'layer'.* Did you mean layers\?",
        ),
        (
            {"rank_pattern": {"q_proj": 2, "q_prj": 2}},
            r"rank_pattern: .*\['q_prj'\] match none\. Did you mean q_proj\?",
        ),
        ({"rank_pattern": {"o_proj": 2}}, r"rank_pattern: expected .* attached to, q_proj, v_proj, got"),
        ({"alpha_pattern": {"layers.[5-9].*q_proj": 2}}, r"alpha_pattern: .* match none"),
        ({"target_parameters": ["q_proj.wieght"]}, r"target_parameters: .* Did you mean q_proj\.weight\?"),
        (
            {"trainable_token_indices": [5, 320]},
            r"trainable_token_indices: expected token ids from 0 to 319, .* \[320\]",
        ),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, r"trainable_token_indices: .* got \[-1\]"),
        ({"alora_invocation_tokens": [5, 321]}, r"alora_invocation_tokens: .* got \[321\]"),
        ({"trainable_token_indices": {"embeddings": [5]}}, r"trainable_token_indices: .* got \['embeddings'\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_matches_nothing_is_named_and_nothing_stays_attached(
    tiny_llama: LlamaForCausalLM, lora_config: Any, settings: dict[str, Any], message: str
) -> None:
    before = [name for name, _ in tiny_llama.named_modules()]
    with pytest.raises(ValueError, match=rf"^adapter\.{message}"):
        attach_adapter(tiny_llama, lora_config(**settings))
    assert [name for name, _ in tiny_llama.named_modules()] == before


@pytest.mark.parametrize(
    ("settings", "adapted"),
    [
        ({"target_modules": r".*\.1\..*q_proj"}, {"1.q_proj"}),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, {"1.q_proj", "1.v_proj"}),
        ({"layers_to_transform": 0}, {"0.q_proj", "0.v_proj"}),
        ({"exclude_modules": r".*\.0\..*"}, {"1.q_proj", "1.v_proj"}),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, {"0.v_proj", "1.q_proj", "1.v_proj"}),
        ({"rank_pattern": {r"^model\.layers\.0\..*q_proj": 2}}, {"0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"}),
        ({"target_modules": None}, {"0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"}),  # PEFT's choice for a Llama
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_matches_is_left_to_peft(
    tiny_llama: LlamaForCausalLM, lora_config: Any, settings: dict[str, Any], adapted: set[str]
) -> None:
    model = attach_adapter(tiny_llama, lora_config(**settings))
    found = {name.split(".")[4] + "." + name.split(".")[6] for name, p in model.named_parameters() if p.requires_grad}
    assert found == adapted


@pytest.mark.parametrize(
    "adapter",
    [
        TrainableTokensConfig(token_indices=[1, 400], task_type="CAUSAL_LM"),
        IA3Config(target_modules=["k_proj", "up_prj"], feedforward_modules=["up_prj"], task_type="CAUSAL_LM"),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
def test_other_methods_are_checked_too(tiny_llama: LlamaForCausalLM, adapter: Any) -> None:
    with pytest.raises(ValueError, match=r"^adapter\.(token_indices: .*\[400\]|target_modules: .*\['up_prj'\])"):
        attach_adapter(tiny_llama, adapter)


def test_no_weight_is_looked_at(make_tiny_llama: Any) -> None:
    with torch.device("meta"):
        empty = LlamaForCausalLM(make_tiny_llama().config)
        with pytest.raises(ValueError, match=r"modules_to_save: .*lm_haed"):
            attach_adapter(empty, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_haed"]))
