"""A row to a conversation: which form it is written in, whose turn is whose, and what a conversation needs to be learnt from.

Five forms are known by their columns. Each becomes a list of messages with `role` (system, user, assistant, or tool) and
`content`, as chat templates take them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from grit_lightning.datamodules.pipeline.text import UnusableColumnError, as_text
from grit_lightning.errors import InvalidValueError, did_you_mean

FormName = Literal["messages", "conversations", "prompt_completion", "instruction_output", "question_answer"]
Row = Mapping[str, Any]


class UnusableConversationError(InvalidValueError):
    """A row is no conversation to learn from.

    Attributes:
        problem: What was expected and what came.
        reason: The same in a few words, to be counted.
    """

    def __init__(self, problem: str, reason: str) -> None:
        """Keep both."""
        super().__init__(problem, reason)
        self.problem, self.reason = problem, reason


class Turn(NamedTuple):
    """One message.

    Attributes:
        message: `role`, `content`, and what else is passed on to the chat template.
        learnt: Whether it is the assistant's and to be learnt.
    """

    message: dict[str, Any]
    learnt: bool = False

    @property
    def role(self) -> str:
        """Who speaks."""
        return str(self.message["role"])


@dataclass(frozen=True)
class Form:
    """A way to write a conversation into a row.

    Attributes:
        columns: Columns that it needs.
        optional: Columns that it reads if they are there.
        read: Row → messages.
    """

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Row], list[Any]]


def _pair(question: str, answer: str, context: str | None = None) -> Form:
    def read(row: Row) -> list[Any]:
        asked = _filled(row, question)
        given = "" if context is None else as_text(row.get(context), context)
        asked = f"{asked}\n\n{given}" if given.strip() else asked
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": _filled(row, answer)}]

    return Form((question, answer), ("system", *([context] if context else [])), read)


def _list(column: str) -> Form:
    def read(row: Row) -> list[Any]:
        found = row[column]
        if not isinstance(found, list) or not found:
            got = "nothing" if found is None or found == [] else f"{str(found)[:40]!r} of type {type(found).__name__}"
            raise UnusableConversationError(
                f"column {column!r}: expected a list of messages, got {got}", f"column {column!r} without messages"
            )
        return found

    return Form((column,), ("system", "tools"), read)


FORMS: Mapping[FormName, Form] = {
    "messages": _list("messages"),
    "conversations": _list("conversations"),
    "prompt_completion": _pair("prompt", "completion"),
    "instruction_output": _pair("instruction", "output", "input"),
    "question_answer": _pair("question", "answer"),
}
"""The forms by name."""

COLUMNS = tuple(dict.fromkeys(column for form in FORMS.values() for column in (*form.columns, *form.optional)))
"""All columns that a form may have."""

ROLES = ("system", "user", "assistant", "tool")
_OWN = ("from", "value", "weight")  # of a message, for us and not for the template
_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def recognise(found: Collection[str], columns: Mapping[str, str], form: FormName | None = None) -> list[FormName]:
    """Return the forms that a table has the columns of; one if it is chosen, or named by `columns`.

    Args:
        found: Columns of the table.
        columns: Column of a form → column of the table, where the names differ.
        form: The form, if it is chosen.

    Example:
        >>> recognise(["prompt", "completion", "id"], {}), recognise(["q", "a"], {"question": "q", "answer": "a"})
        (['prompt_completion'], ['question_answer'])
    """
    fitting = [
        name
        for name, known in FORMS.items()
        if form in (None, name) and all(columns.get(column, column) in found for column in known.columns)
    ]
    named = [name for name in fitting if any(column in columns for column in FORMS[name].columns)]
    return named if len(named) == 1 else fitting


def read_turns(row: Row, form: FormName, *, tool_turns: bool = False) -> list[Turn]:
    """Read the conversation of a row, up to the last turn of the assistant.

    Args:
        row: Columns of the form.
        form: How the row is written.
        tool_turns: Pass tool calls and their results on to the chat template; otherwise they are refused.

    Returns:
        Turns; OpenAI's `weight: 0` on a message of the assistant says that it is not learnt.

    Raises:
        UnusableConversationError: A message is empty, has an unknown role, or is no text; there is no turn of the assistant
            to learn, or no turn of the user before it.
        ValueError: A column holds no text.
    """
    turns = [
        _turn(message, number, tool_turns=tool_turns) for number, message in enumerate(FORMS[form].read(row), start=1)
    ]
    system = as_text(row.get("system"), "system")
    if system.strip():
        if any(turn.role == "system" for turn in turns):
            raise UnusableConversationError(
                "system: expected a system message once, got a column 'system' and a message with that role",
                "two system messages",
            )
        turns.insert(0, Turn({"role": "system", "content": system}))
    _require_learnable(turns)
    last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    return turns[: last + 1]


def with_system(turns: Sequence[Turn], system: str | None, *, merge: bool) -> list[Turn]:
    """Give a conversation a system message if it has none; merge it into the first turn of the user if asked to.

    Args:
        turns: The conversation.
        system: The message; None for none.
        merge: Write the system message before the user's first words, for chat templates that refuse it.
    """
    found = list(turns)
    if system and found[0].role != "system":
        found.insert(0, Turn({"role": "system", "content": system}))
    if merge and len(found) > 1 and found[0].role == "system" and found[1].role == "user":
        first, second = found[0].message["content"], found[1].message
        found[:2] = [Turn({**second, "content": f"{first}\n\n{second['content']}"})]
    return found


def read_tools(row: Row) -> list[Any] | None:
    """Return the descriptions of tools in a row, as a list or as its JSON text.

    Raises:
        UnusableConversationError: They are no list.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        with suppress(ValueError):  # which leaves the text, to be refused
            tools = json.loads(tools) if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise UnusableConversationError(
            f"column 'tools': expected a list of tools, or one as JSON, got {str(tools)[:40]!r}",
            "tools that are no list",
        )
    return tools


def _require_learnable(turns: Sequence[Turn]) -> None:
    speakers = [turn.role for turn in turns]
    if not any(turn.learnt for turn in turns):
        raise UnusableConversationError(
            f"expected a turn of the assistant to learn, got {_shown(speakers)}", "no turn of the assistant"
        )
    if "user" not in speakers[: speakers.index("assistant")]:
        raise UnusableConversationError(
            f"expected a turn of the user before the assistant's first, got {_shown(speakers)}",
            "no turn of the user before the assistant's",
        )


def _turn(message: Any, number: int, *, tool_turns: bool) -> Turn:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise UnusableConversationError(
            f"{where}: expected an object with role and content, got {str(message)[:40]!r}",
            "a message that is no object",
        )
    given = message.get("role", message.get("from"))
    role = _ALIASES.get(str(given).lower(), str(given).lower())
    if role not in ROLES:
        known = (*ROLES, *_ALIASES)
        raise UnusableConversationError(
            f"{where}: expected one of the roles {', '.join(known)}, got {given!r}.{did_you_mean(str(given), known)}".rstrip(
                "."
            ),
            f"unknown role {given!r}",
        )
    weight = 1 if message.get("weight") is None else message["weight"]
    if weight not in (0, 1):
        raise UnusableConversationError(
            f"{where}: expected a weight of 0 or 1, got {weight!r}", "a weight that is neither 0 nor 1"
        )
    calls = message.get("tool_calls") or message.get("function_call")
    if (role == "tool" or calls or given == "function_call") and not tool_turns:
        raise UnusableConversationError(
            f"{where}: expected turns of system, user and assistant, got {'a tool call' if role != 'tool' else repr(given)}. "
            "Set tool_turns to pass to hand tool calls and their results to the chat template",
            "turns of tools",
        )
    content = _content(message.get("content", message.get("value")), where)
    if not content.strip() and not calls:
        raise UnusableConversationError(f"{where} ({given}): expected text, got an empty message", "an empty message")
    passed = {key: value for key, value in message.items() if key not in _OWN and value not in (None, [])}
    learnt = role == "assistant" and bool(weight)
    return Turn({**passed, "role": role, "content": content}, learnt)


def _content(content: Any, where: str) -> str:
    """Return a message's text, also where it is a list of parts, all of which have to be text."""
    parts = content if isinstance(content, list) else [content]
    texts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part for part in parts
    ]
    for part in texts:
        if part is not None and not isinstance(part, str):
            raise UnusableConversationError(
                f"{where}: expected text, got {str(part)[:40]!r} of type {type(part).__name__}",
                "a message that is no text",
            )
    return "".join(part or "" for part in texts)


def _filled(row: Row, column: str) -> str:
    text = as_text(row.get(column), column)
    if not text.strip():
        raise UnusableColumnError(column, "expected a value, got an empty field")
    return text


def _shown(speakers: Sequence[str]) -> str:
    return ", ".join(speakers) or "nothing"
