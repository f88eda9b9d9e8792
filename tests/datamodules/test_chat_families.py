"""The chat templates of the tests render as published, and their tokenizers lose nothing."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest

from .chat_families import CHAT_FAMILIES, CONVERSATION, chat_template, chat_tokenizer

FAMILIES = pytest.mark.parametrize("name", CHAT_FAMILIES)


def _rendered(name: str, messages: list[dict[str, str]], **settings: Any) -> str:
    text = chat_tokenizer(name).apply_chat_template(messages, tokenize=False, **settings)
    assert isinstance(text, str)
    return text


@FAMILIES
def test_a_conversation_renders_as_written_by_hand(name: str) -> None:
    family = CHAT_FAMILIES[name]

    assert _rendered(name, family.messages) == family.rendering


@FAMILIES
def test_what_is_learnt_is_every_answer_with_its_turn_end(name: str) -> None:
    family = CHAT_FAMILIES[name]
    answers = [message["content"] for message in CONVERSATION if message["role"] == "assistant"]

    assert [family.rendering[start:end] for start, end in family.learnt_characters] == family.learnt
    for answer, learnt in zip(answers, family.learnt, strict=True):
        assert learnt.endswith(answer + family.turn_end)


@FAMILIES
def test_the_tokenizer_loses_nothing_and_a_turn_end_is_one_token(name: str) -> None:
    family, tokenizer = CHAT_FAMILIES[name], chat_tokenizer(name)
    tokens = tokenizer(family.rendering, add_special_tokens=False)["input_ids"]

    assert tokenizer.decode(tokens) == family.rendering
    assert tokens.count(tokenizer.convert_tokens_to_ids(family.turn_end)) >= 2
    assert set(family.tokens) <= set(tokenizer.all_special_tokens)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (family.bos, family.eos)


@FAMILIES
def test_a_tokenizer_with_a_bos_writes_it_before_any_text_so_that_a_rendering_would_have_two(name: str) -> None:
    family, tokenizer = CHAT_FAMILIES[name], chat_tokenizer(name)
    tokens = tokenizer(family.rendering)["input_ids"]

    if family.bos is not None:
        assert tokens[:2] == [tokenizer.bos_token_id] * 2
    else:
        assert tokens == tokenizer(family.rendering, add_special_tokens=False)["input_ids"]


@FAMILIES
def test_a_question_ends_in_what_starts_the_answer(name: str) -> None:
    family = CHAT_FAMILIES[name]
    question = family.messages[:-1]
    with_start = _rendered(name, question, add_generation_prompt=True)

    assert with_start.endswith(family.answer_start)
    assert family.rendering.startswith(with_start) or not family.growing


@FAMILIES
def test_a_rendering_grows_by_its_end_only_or_is_said_not_to(name: str) -> None:
    family = CHAT_FAMILIES[name]
    lengths = [length for length in range(1, len(family.messages)) if family.messages[length - 1]["role"] != "system"]

    grows = all(family.rendering.startswith(_rendered(name, family.messages[:length])) for length in lengths)

    assert grows is family.growing


@FAMILIES
def test_white_space_around_an_answer_is_trimmed_or_is_said_not_to_be(name: str) -> None:
    family = CHAT_FAMILIES[name]
    padded = [*family.messages[:-1], {"role": "assistant", "content": " 9. "}]

    assert (_rendered(name, padded) == family.rendering) is family.trims


@pytest.mark.parametrize("name", [name for name, family in CHAT_FAMILIES.items() if not family.takes_system])
def test_a_system_message_is_refused_where_said_so(name: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=r"System role|must alternate"):
        _rendered(name, CONVERSATION)


@pytest.mark.parametrize("name", [name for name, family in CHAT_FAMILIES.items() if family.alternates])
def test_two_turns_of_one_role_are_refused_where_said_so(name: str) -> None:
    with pytest.raises(jinja2.TemplateError, match="must alternate"):
        _rendered(name, [CONVERSATION[1], CONVERSATION[1]])


@pytest.mark.parametrize(
    ("name", "theirs"), [("smollm2", "You are a helpful AI assistant named SmolLM,"), ("qwen2_5", "You are Qwen")]
)
def test_two_families_have_a_system_message_of_their_own(name: str, theirs: str) -> None:
    assert _rendered(name, CONVERSATION[1:]).startswith(f"<|im_start|>system\n{theirs}")


def test_generation_marks_cover_the_turn_end_or_leave_it_out() -> None:
    for name, expected in {
        "chatml_marked": ["4.<|im_end|>", "9.<|im_end|>"],
        "chatml_marked_without_end": ["4.", "9."],
    }.items():
        tokenizer = chat_tokenizer(name)
        encoded = tokenizer.apply_chat_template(
            CONVERSATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        marked = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]

        assert tokenizer.decode(marked) == "".join(expected)


def test_a_thought_of_an_earlier_answer_is_taken_away() -> None:
    thought = [
        {**message, "content": f"<think>\nhm\n</think>\n\n{message['content']}"} for message in CONVERSATION[2:3]
    ]

    text = _rendered("qwen3", [*CONVERSATION[:2], *thought, *CONVERSATION[3:]])

    assert text == CHAT_FAMILIES["qwen3"].rendering


def test_one_template_writes_the_day_on_which_it_is_rendered() -> None:
    tokenizer = chat_tokenizer("llama3")
    tokenizer.chat_template = chat_template("llama3_dated")

    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, date_string="01 Jan 2001")
    today = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)

    assert "Today Date: 01 Jan 2001\n" in text
    assert "26 Jul 2024" not in today
