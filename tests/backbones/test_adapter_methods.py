"""PEFT methods, initialisations and settings that would train nothing, something else, or on the answers themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    ArrowConfig,
    CPTConfig,
    LilyConfig,
    LoftQConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PeftConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    XLoraConfig,
    get_peft_model,
)
from torch import nn

from grit_lightning.backbones.adapter_methods import require_generation, require_method
from grit_lightning.backbones.adapters import attach_adapter

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
REFUSED: list[tuple[PeftConfig, str]] = [
    (PromptTuningConfig(num_virtual_tokens=4, **CAUSAL), "virtual tokens before a row's padding"),
    (
        PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, **CAUSAL),
        "virtual tokens before a row's padding",
    ),
    (CPTConfig(cpt_token_ids=[5, 6], cpt_tokens_type_mask=[1, 2], **CAUSAL), "virtual tokens before a row's padding"),
    (MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2, **CAUSAL), "a task id for each row"),
    (PolyConfig(target_modules=["q_proj"], **CAUSAL), "a task id for each row"),
    (LilyConfig(target_modules=["q_proj"], **CAUSAL), "chosen by all tokens of a batch"),
    (XLoraConfig(hidden_size=32, adapters={"one": "nowhere"}, **CAUSAL), "mixes adapters that are trained already"),
]


@pytest.mark.parametrize(("adapter", "reason"), REFUSED, ids=lambda value: type(value).__name__)
def test_methods_that_cannot_learn_from_these_batches_are_refused(adapter: PeftConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^adapter: expected .* got {type(adapter).__name__}, .*{reason}.* Use "):
        require_method(adapter)


def _logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def _random(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model.eval()


def test_why_lily_is_refused_a_later_token_changes_earlier_predictions(tiny_llama: Any) -> None:
    model = _random(get_peft_model(tiny_llama, LilyConfig(target_modules=["q_proj", "v_proj"], **CAUSAL)))
    ids = torch.randint(4, 300, (1, 6))
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % 300
    ones = torch.ones_like(ids)
    assert not torch.allclose(_logits(model, ids, ones)[:, :-1], _logits(model, other, ones)[:, :-1], atol=1e-3)


@pytest.mark.filterwarnings("ignore:`eva_config` is not specified|`init_lora_weights` is 'eva'|.*corda_config")
@pytest.mark.parametrize(
    ("init", "needed"), [("eva", "activations"), ("corda", "covariances"), ("lora_ga", "gradients")]
)
def test_initialisations_that_need_data_are_refused(lora_config: Any, init: str, needed: str) -> None:
    with pytest.raises(ValueError, match=rf"adapter\.init_lora_weights: .* got {init}, for which the {needed}"):
        require_method(lora_config(init_lora_weights=init))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_2", "mica"])
def test_initialisations_from_the_weights_alone_are_taken(lora_config: Any, init: Any) -> None:
    require_method(lora_config(init_lora_weights=init))


@pytest.mark.filterwarnings("ignore:`loftq_config` specified")
def test_an_initialisation_that_needs_a_gpu_is_refused_without_one(
    lora_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = lora_config(init_lora_weights="loftq", loftq_config=LoftQConfig())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_method(adapter)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"adapter\.init_lora_weights: .* got loftq, .* a GPU"):
        require_method(adapter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r: expected a positive rank, got 0"),
        ({"r": 2.5}, r"r: expected a positive rank, got 2\.5"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\]: expected a positive rank, got -1"),
        ({"lora_alpha": 0}, "lora_alpha: expected a number other than 0"),
        ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\['q_proj'\]: expected a number other than 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout: expected a share in \[0, 1\), got 1\.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout: expected a share in \[0, 1\), got -0\.1"),
        ({"task_type": "SEQ_CLS"}, "task_type: expected CAUSAL_LM, .* got SEQ_CLS"),
        ({"use_qalora": True}, "use_qalora: expected false"),
        ({"arrow_config": ArrowConfig()}, "arrow_config: expected null"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_with_which_nothing_would_be_learnt_are_named(
    lora_config: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^adapter\.{message}"):
        require_method(lora_config(**settings))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"init_lora_weights": "gausian"}, "gausian"),
        ({"bias": "lora"}, "lora"),
        ({"layer_replication": [(0, 9)]}, "index"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_peft_cannot_build_is_one_sentence(
    tiny_llama: Any, lora_config: Any, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"^adapter: expected a LoraConfig that PEFT can attach .*{named}.* Change the"
    ):
        attach_adapter(tiny_llama, lora_config(**settings))


def test_a_method_whose_own_default_is_rank_zero_is_attached(tiny_llama: Any, batch: dict[str, torch.Tensor]) -> None:
    model = attach_adapter(tiny_llama, OFTConfig(target_modules=["q_proj"], **CAUSAL))
    model(**batch).loss.backward()
    assert sum(p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.parameters()) == 2


def test_a_configuration_that_was_saved_with_a_trained_adapter_is_trained_anew(
    make_tiny_llama: Callable[..., Any], lora_config: Callable[..., LoraConfig], tmp_path: Any
) -> None:
    attach_adapter(make_tiny_llama(), lora_config(base_model_name_or_path="elsewhere")).save_pretrained(tmp_path)
    saved = PeftConfig.from_pretrained(tmp_path)
    assert saved.inference_mode
    model = attach_adapter(make_tiny_llama(), saved)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 2 * 2
    assert saved.inference_mode  # the caller's object is as it was


def test_answers_behind_a_prefix_are_not_generated(lora_config: Any) -> None:
    require_generation(lora_config())
    with pytest.raises(ValueError, match=r"^model\.generation: expected null, .* PrefixTuningConfig"):
        require_generation(PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL))


@pytest.mark.filterwarnings("ignore:.*`past_key_values`.*:FutureWarning")  # transformers has renamed it, PEFT has not
def test_why_generation_behind_a_prefix_is_refused_it_continues_differently(tiny_llama: Any) -> None:
    model: Any = _random(get_peft_model(tiny_llama, PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape)
    ids = torch.randint(4, 300, (4, 6))
    ones = torch.ones_like(ids)
    new = model.generate(input_ids=ids, attention_mask=ones, max_new_tokens=1, do_sample=False, pad_token_id=0)[:, 6]
    assert not torch.equal(new, _logits(model, ids, ones)[:, -1].argmax(-1))
