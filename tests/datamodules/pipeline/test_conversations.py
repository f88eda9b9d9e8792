"""Rows to conversations: five forms, whose turn is whose, and what cannot be learnt from."""

from __future__ import annotations

from typing import Any

import pytest

from grit_lightning.datamodules.pipeline.conversations import (
    FORMS,
    FormName,
    UnusableConversationError,
    read_turns,
    recognise,
    with_system,
)
from grit_lightning.datamodules.pipeline.text import UnusableColumnError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
QUESTION_AND_ANSWER = [("user", "q", False), ("assistant", "a", True)]


def read(row: dict[str, Any], form: FormName, **settings: Any) -> list[tuple[str, str, bool]]:
    """Role, content and whether it is learnt, of each turn."""
    return [(turn.role, turn.message["content"], turn.learnt) for turn in read_turns(row, form, **settings)]


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("prompt_completion", {"prompt": "q", "completion": "a"}),
        ("question_answer", {"question": "q", "answer": "a"}),
        ("instruction_output", {"instruction": "q", "output": "a"}),
        ("instruction_output", {"instruction": "q", "input": "", "output": "a"}),
        ("instruction_output", {"instruction": "q", "input": None, "output": "a"}),
        ("messages", {"messages": [USER, ASSISTANT]}),
        ("messages", {"messages": [USER, {**ASSISTANT, "content": [{"type": "text", "text": "a"}]}]}),
        ("conversations", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ("conversations", {"conversations": [USER, ASSISTANT]}),
    ],
)
def test_every_form_gives_the_same_conversation(form: FormName, row: dict[str, Any]) -> None:
    assert read(row, form) == QUESTION_AND_ANSWER
    assert recognise(list(row), {}) == [form]
    system = ("system", "s", False)
    assert read({**row, "system": "s"}, form) == [system, *QUESTION_AND_ANSWER]


def test_the_input_of_an_instruction_follows_it() -> None:
    row = {"instruction": "Translate.", "input": "chat", "output": "cat"}
    assert read(row, "instruction_output")[0] == ("user", "Translate.\n\nchat", False)


def test_numbers_are_the_text_that_stands_in_the_file() -> None:
    assert read({"question": 1, "answer": 2}, "question_answer") == [("user", "1", False), ("assistant", "2", True)]


def test_what_follows_the_last_answer_is_left_out() -> None:
    assert read({"messages": [USER, ASSISTANT, USER]}, "messages") == QUESTION_AND_ANSWER


def test_an_answer_of_weight_zero_is_not_learnt() -> None:
    row = {"messages": [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}]}
    assert [learnt for _, _, learnt in read(row, "messages")] == [False, False, False, True]
    assert all("weight" not in turn.message for turn in read_turns(row, "messages"))


def test_tool_calls_are_passed_on_if_asked_for() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    turns = read_turns(
        {"messages": [USER, call, {"role": "tool", "content": "7"}, ASSISTANT]}, "messages", tool_turns=True
    )
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert turns[1].message["tool_calls"] == [{"name": "f"}]
    assert turns[1].learnt


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "column 'messages': expected a list of messages, got nothing"),
        ("hello", "column 'messages': expected a list of messages, got 'hello' of type str"),
        ([USER], "expected a turn of the assistant to learn, got user"),
        ([USER, {**ASSISTANT, "weight": 0}], "expected a turn of the assistant to learn, got user, assistant"),
        ([ASSISTANT], "expected a turn of the user before the assistant's first, got assistant"),
        ([USER, {**ASSISTANT, "content": " "}], r"message 2 \(assistant\): expected text, got an empty message"),
        ([{**USER, "content": None}, ASSISTANT], r"message 1 \(user\): expected text, got an empty message"),
        ([{**USER, "content": 7}, ASSISTANT], "message 1: expected text, got '7' of type int"),
        ([{**USER, "content": [{"type": "image"}]}, ASSISTANT], "message 1: expected text, got .*image"),
        (
            [{**USER, "role": "usr"}, ASSISTANT],
            "message 1: expected one of the roles system, user, .*, got 'usr'.*`user`",
        ),
        ([USER, {**ASSISTANT, "weight": 0.5}], "message 2: expected a weight of 0 or 1, got 0.5"),
        ([USER, {"role": "tool", "content": "7"}, ASSISTANT], "message 2: .*got 'tool'. Set tool_turns to pass"),
        ([USER, {**ASSISTANT, "tool_calls": [{}]}, ASSISTANT], "message 2: .*got a tool call. Set tool_turns to pass"),
        (["hello"], "message 1: expected an object with role and content, got 'hello'"),
    ],
)
def test_a_conversation_that_cannot_be_learnt_from_says_why(messages: Any, problem: str) -> None:
    with pytest.raises(UnusableConversationError, match=problem) as raised:
        read_turns({"messages": messages}, "messages")
    assert raised.value.reason


@pytest.mark.parametrize("empty", ["prompt", "completion"])
def test_an_empty_field_is_named(empty: str) -> None:
    row = {"prompt": "q", "completion": "a"} | {empty: " "}
    with pytest.raises(UnusableColumnError, match=f"column '{empty}': expected a value, got an empty field"):
        read_turns(row, "prompt_completion")


def test_two_system_messages_are_refused() -> None:
    row = {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT], "system": "t"}
    with pytest.raises(UnusableConversationError, match="system: expected a system message once"):
        read_turns(row, "messages")


def test_a_system_message_is_added_and_can_be_merged() -> None:
    turns = read_turns({"messages": [USER, ASSISTANT]}, "messages")
    assert [turn.role for turn in with_system(turns, "s", merge=False)] == ["system", "user", "assistant"]
    merged = with_system(turns, "s", merge=True)
    assert [(turn.role, turn.message["content"]) for turn in merged] == [("user", "s\n\nq"), ("assistant", "a")]
    own = read_turns({"messages": [USER, ASSISTANT], "system": "own"}, "messages")
    assert with_system(own, "s", merge=False) == own
    assert with_system(turns, None, merge=True) == turns


def test_columns_choose_among_forms() -> None:
    found = ["question", "answer", "q", "a"]
    assert recognise(found, {}) == ["question_answer"]
    assert recognise(found, {"prompt": "q", "completion": "a"}) == ["prompt_completion"]
    assert recognise([*found, "messages"], {}) == ["messages", "question_answer"]
    assert recognise([*found, "messages"], {}, "question_answer") == ["question_answer"]
    assert recognise(found, {}, "messages") == []
    assert set(FORMS) == {"messages", "conversations", "prompt_completion", "instruction_output", "question_answer"}
