"""Decoding: what one unpadded row gives with plain argmax, for any batch and padding, and nothing else is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from grit_lightning.backbones.adapters import attach_adapter
from grit_lightning.backbones.loading import load_backbone
from grit_lightning.batches import left_padded_prompts
from grit_lightning.evaluation.generation import GenerationSettings, generate_answers
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.rank_space import RankSpaceGeometry

PROMPTS = [[10, 11, 12, 13, 14, 15, 16], [20, 21], [30, 31, 32], [20, 21, 22, 23]]
NEW = 12


class Ids:
    """Stands in for a tokenizer and shows tokens as their numbers, of which the end tokens are special."""

    name_or_path = "ids"

    def __init__(self, eos: int | None = 2, pad: int | None = None, special: tuple[int, ...] = ()) -> None:
        self.eos_token_id, self.pad_token_id = eos, pad
        self.special = {eos, *special}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i in self.special))


@torch.no_grad()
def reference(model: Any, prompt: list[int], ends: set[int], steps: int = NEW) -> tuple[str, bool]:
    """Greedy decoding of one row: whole forward passes without padding, mask, positions or cache."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            return " ".join(map(str, ids[len(prompt) : -1])), True
    return " ".join(map(str, ids[len(prompt) :])), False


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The prompts as a batch of the data module has them, with an answer of two tokens behind each, then cut to prompts."""
    rows, width = [[*prompt, 50, 51] for prompt in PROMPTS], max(map(len, PROMPTS)) + 2
    fill = [[0] * (width - len(row)) for row in rows]
    ids = torch.tensor([row + gap if side == "right" else gap + row for row, gap in zip(rows, fill, strict=True)])
    mask = (ids != 0).long()
    start = mask.cumsum(-1).eq(mask.sum(-1, keepdim=True) - 1).int().argmax(-1)  # the column of the token 50
    return left_padded_prompts(ids, mask, start)


@pytest.fixture(params=["relative positions", "absolute positions"])
def model(request: pytest.FixtureRequest, make_tiny_llama: Callable[..., Any], lora_config: Any) -> Any:
    """A float64 Llama, and a GPT-2, where a position that padding has shifted changes the output; with trained adapters."""
    if request.param == "relative positions":
        backbone, targets = make_tiny_llama(), ["q_proj", "v_proj"]
    else:
        config = GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        config.bos_token_id, config.eos_token_id = 1, 2
        backbone, targets = GPT2LMHeadModel(config), ["c_attn"]
    backbone.config.use_cache = False  # as load_backbone leaves it
    model = attach_adapter(backbone, lora_config(target_modules=targets, fan_in_fan_out=targets == ["c_attn"])).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_greedy_answers_equal_those_of_single_unpadded_rows(model: Any, side: str, batch_size: int | None) -> None:
    long, _ = reference(model, PROMPTS[1], set())
    early = int(long.split()[4])  # a second end token, which one row comes to early
    model.generation_config.eos_token_id = [2, early]
    prompts, mask = padded(side)
    settings = GenerationSettings(max_new_tokens=NEW, batch_size=batch_size)
    answers = generate_answers(model, Ids(special=(early,)), prompts, mask, settings)  # type: ignore[arg-type]
    expected = [reference(model, prompt, {2, early}) for prompt in PROMPTS]
    assert [tuple(answer) for answer in answers] == expected
    assert len({finished for _, finished in expected}) == 2, "some rows end early and some are cut off"


def test_the_models_own_generation_settings_do_not_apply(model: Any) -> None:
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=1.8, num_beams=1)
    model.generation_config.no_repeat_ngram_size = 1
    prompts, mask = padded("left")
    answers = generate_answers(model, Ids(), prompts, mask, GenerationSettings(max_new_tokens=NEW))  # type: ignore[arg-type]
    assert [tuple(answer) for answer in answers] == [reference(model, prompt, {2}) for prompt in PROMPTS]


def test_draws_follow_the_nucleus_of_the_tempered_distribution(model: Any) -> None:
    rows, temperature, top_p = 1500, 0.7, 0.6
    settings = GenerationSettings(max_new_tokens=1, do_sample=True, temperature=temperature, top_p=top_p)
    prompts = torch.tensor([PROMPTS[0]]).expand(rows, -1)
    answers = generate_answers(model, Ids(eos=319), prompts, torch.ones_like(prompts), settings)  # type: ignore[arg-type]
    drawn = Counter(int(answer.text or 319) for answer in answers)
    with torch.no_grad():
        probabilities = (model(input_ids=prompts[:1]).logits[0, -1] / temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    size = int((probabilities[order].cumsum(0) < top_p).sum()) + 1
    nucleus = {int(token): float(probabilities[token] / probabilities[order[:size]].sum()) for token in order[:size]}
    assert set(drawn) <= set(nucleus)
    for token, probability in nucleus.items():
        five_sigma = 5 * (rows * probability * (1 - probability)) ** 0.5 + 1
        assert abs(drawn[token] - rows * probability) < five_sigma


def test_a_seed_repeats_the_draws_and_leaves_the_random_numbers_alone(model: Any) -> None:
    prompts, mask = padded("left")
    settings = GenerationSettings(max_new_tokens=NEW, do_sample=True, temperature=2.0)
    before = torch.get_rng_state()
    first = generate_answers(model, Ids(), prompts, mask, settings)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert generate_answers(model, Ids(), prompts, mask, settings) == first  # type: ignore[arg-type]
    assert generate_answers(model, Ids(), prompts, mask, settings, seed=7) != first  # type: ignore[arg-type]


def test_modes_cache_and_geometry_are_as_before(
    make_tiny_llama: Callable[..., Any], lora_config: Any, random_batch: Any
) -> None:
    model = attach_adapter(load_backbone(make_tiny_llama(), gradient_checkpointing=True), lora_config(lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)  # so that dropout would show
    geometry = RankSpaceGeometry(model, GeometryConfig())
    batch = random_batch()
    geometry.start_micro_batch(batch["attention_mask"], torch.tensor(1.0), None)
    model(**batch).loss.backward()
    geometry.finish_micro_batch()
    model.get_base_model().model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    statistics = {name: value.clone() for name, value in _tensors(geometry.state_dict())}

    prompts, mask = padded("left")
    answers = generate_answers(model, Ids(), prompts, mask, GenerationSettings(max_new_tokens=NEW))  # type: ignore[arg-type]

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config.use_cache is False
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    after = dict(_tensors(geometry.state_dict()))
    assert after.keys() == statistics.keys()
    assert all(torch.equal(after[name], value) for name, value in statistics.items())
    model.eval()
    assert [tuple(answer) for answer in answers] == [reference(model, prompt, {2}) for prompt in PROMPTS]


def test_the_cache_is_used(model: Any) -> None:
    lengths: list[int] = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    prompts, mask = padded("left")
    generate_answers(model, Ids(eos=319), prompts, mask, GenerationSettings(max_new_tokens=5))  # type: ignore[arg-type]
    assert lengths == [7, 1, 1, 1, 1]


def test_a_stop_string_ends_an_answer_and_is_cut_off(make_tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = make_tiny_llama(max_position_embeddings=512).eval()
    prompts = torch.tensor(tiny_tokenizer(["Is it so?", "What is"], padding=True, padding_side="left").input_ids)
    mask = (prompts != 0).long()
    settings = GenerationSettings(max_new_tokens=40, do_sample=True, temperature=3.0, seed=1)
    whole = generate_answers(model, tiny_tokenizer, prompts, mask, settings)
    stop = next(c for c in whole[0].text[5:] if c.isascii() and c.isprintable() and c != " ")
    seen: list[Any] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    settings = GenerationSettings(max_new_tokens=40, do_sample=True, temperature=3.0, seed=1, stop_strings=(stop,))
    answers = generate_answers(model, tiny_tokenizer, prompts[:1], mask[:1], settings)
    assert stop not in answers[0].text
    assert answers[0].finished
    assert len(seen) < 40


def test_more_tokens_may_end_an_answer(model: Any) -> None:
    settings = GenerationSettings(max_new_tokens=NEW)
    prompts, mask = padded("right")
    whole = generate_answers(model, Ids(), prompts, mask, settings)
    stop = int(whole[0].text.split()[3])
    stopped = generate_answers(model, Ids(special=(stop,)), prompts, mask, settings, stop_ids=[stop])
    expected = [reference(model, prompt, {2, stop}) for prompt in PROMPTS]
    assert [(answer.text, answer.finished) for answer in stopped] == expected
    assert stopped[0].finished


def test_a_prompt_without_tokens_is_refused(model: Any) -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(ValueError, match="Prompts: expected at least one token in each, got a prompt without any"):
        generate_answers(model, Ids(), torch.ones_like(mask), mask, GenerationSettings(max_new_tokens=2))  # type: ignore[arg-type]


def test_an_answer_that_does_not_fit_the_context_names_both_settings(model: Any) -> None:
    prompts, mask = padded("left")
    context = model.config.max_position_embeddings
    settings = GenerationSettings(max_new_tokens=context - 6)
    with pytest.raises(ValueError, match=rf"got {context + 1} for a prompt of 7 tokens and an .*data.max_length"):
        generate_answers(model, Ids(), prompts, mask, settings)  # type: ignore[arg-type]
    generate_answers(model, Ids(), prompts[:, -2:], mask[:, -2:], GenerationSettings(max_new_tokens=3))  # type: ignore[arg-type]


def test_a_tokenizer_that_ends_no_text_is_refused(model: Any) -> None:
    model.generation_config.eos_token_id = None
    prompts, mask = padded("left")
    with pytest.raises(ValueError, match=r"data\.tokenizer: expected one with an eos_token, without which"):
        generate_answers(model, Ids(eos=None), prompts, mask, GenerationSettings(max_new_tokens=2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("stop_strings", ("",)),
        ("batch_size", 0),
        ("max_rows", 0),
        ("stages", ("train",)),
        ("bertscore_layer", 0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"GenerationSettings.{field}: expected"):
        GenerationSettings(**{field: value})


def _tensors(state: Any, name: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        return [(name, state)]
    if isinstance(state, SimpleNamespace):
        state = vars(state)
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return [found for key, value in pairs for found in _tensors(value, f"{name}.{key}")]
