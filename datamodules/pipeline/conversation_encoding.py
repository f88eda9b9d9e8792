"""Conversations to token ids: every turn of the assistant and the token that ends it is learnt, nothing else.

What of a rendered conversation is the assistant's is found by differences of renderings, and checked: the opened turn, followed
by what it says and its end, has to stand in the rendering of the whole. Templates that write earlier turns in another way once
others follow (Qwen3 drops what was thought) fail that check; their conversations become one row for each turn of the assistant,
each exactly what the model is given when it has to say that turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError

from grit_lightning.datamodules.pipeline.chat_template import ChatTemplate
from grit_lightning.datamodules.pipeline.conversations import (
    FormName,
    Row,
    Turn,
    UnusableConversationError,
    read_tools,
    read_turns,
    with_system,
)
from grit_lightning.datamodules.pipeline.text import UnusableColumnError, normalise
from grit_lightning.datamodules.pipeline.token_cache import tokenizer_hash
from grit_lightning.datamodules.pipeline.tokenized import EncodedRow, RowEncoder


class Answer(NamedTuple):
    """A turn of the assistant in a rendering.

    Attributes:
        before: All that is written before it, its opening included.
        written: What it says, and the token that ends it.
        turn: The turn.
    """

    before: str
    written: str
    turn: Turn


class Piece(NamedTuple):
    """A part of a rendering that is tokenised on its own.

    Attributes:
        text: The text.
        answer: The turn that it is, if it is learnt.
    """

    text: str
    answer: Turn | None = None


@dataclass(frozen=True, kw_only=True)
class ConversationRowEncoder(RowEncoder):
    """Reads the conversation of each row and encodes it.

    Attributes:
        chat: How turns are written.
        max_length: Upper bound on the tokens of a row.
        form: How a row holds its conversation.
        system: System message of conversations without one.
        merge_system: Write the system message before the user's first words.
        tool_turns: Pass tool calls and their results on to the chat template.
        begin_with_bos: Begin a row with the tokenizer's begin-of-sequence token, where the template does not.
    """

    chat: ChatTemplate
    max_length: int
    form: FormName
    system: str | None = None
    merge_system: bool = False
    tool_turns: bool = False
    begin_with_bos: bool = False

    def settings(self) -> dict[str, Any]:
        """Return what else the result depends on."""
        own = ("max_length", "form", "system", "merge_system", "tool_turns", "begin_with_bos")
        tokens = self.chat.tokens
        return {name: getattr(self, name) for name in own} | {
            "tokenizer": tokenizer_hash(tokens.tokenizer),
            "template": self.chat.template,
            "allow_control_tokens": tokens.allow_control_tokens,
        }

    def encode_rows(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[EncodedRow]:
        """Encode rows; a conversation becomes one of them, or one for each turn of the assistant."""
        found: list[list[Piece] | EncodedRow] = []
        for row, number in zip(rows, numbers, strict=True):
            try:
                found += self._renderings(row)
            except UnusableConversationError as error:
                found.append(self.skip(number, error.problem, error.reason, error))
            except UnusableColumnError as error:
                name = self.name(error.column)
                found.append(
                    self.skip(number, f"column {name!r}: {error.problem}", f"column {name!r} empty or no text", error)
                )
            except TemplateError as error:
                problem = (
                    f"expected turns that {self.chat.name} can write, got some that it refuses with {str(error)!r}"
                )
                advice = ", or set merge_system to true" if "ystem" in str(error) else ""
                found.append(self.skip(number, problem + advice, f"refused by the chat template: {error}", error))
        ready = iter(self._fitted([pieces for pieces in found if not isinstance(pieces, EncodedRow)]))
        return [row if isinstance(row, EncodedRow) else next(ready) for row in found]

    # From turns to pieces of text.

    def _renderings(self, row: Row) -> list[list[Piece]]:
        turns = with_system(
            read_turns(row, self.form, tool_turns=self.tool_turns), self.system, merge=self.merge_system
        )
        tools = read_tools(row) if self.tool_turns else None
        messages = [self._message(turn) for turn in turns]
        answers, whole = [], ""
        for index, turn in enumerate(turns):
            if turn.role == "assistant":
                before = self.chat.write(messages[:index], answered=False, tools=tools)
                whole = self.chat.write(messages[: index + 1], answered=True, tools=tools)
                answers.append(self._answer(before, whole, turn, messages[index]["content"]))
        if all(whole.startswith(answer.before + answer.written) for answer in answers):
            return [_pieces(answers)]
        return [_pieces([answer]) for answer in answers if answer.turn.learnt]

    def _message(self, turn: Turn) -> dict[str, Any]:
        """Return a turn as the template gets it: its text in normal form, and without the names of special tokens."""
        content = normalise(turn.message["content"]) if self.normalise_text else turn.message["content"]
        plain: dict[str, Any] = self.chat.tokens.plain({**turn.message, "content": content})
        return {**plain, "role": turn.role}

    def _answer(self, before: str, through: str, turn: Turn, content: str) -> Answer:
        """Find a turn of the assistant between the renderings that end before and behind it.

        Raises:
            UnusableConversationError: It is not there, or not all of it.
        """
        end = self.chat.last_end
        written = through.removeprefix(before).removesuffix(end)
        if len(before) + len(written) + len(end) != len(through) or _dense(content) not in _dense(written):
            raise UnusableConversationError(
                f"expected {self.chat.name} to write the assistant's turn behind its opening, and all of it, got "
                f"{through[-60:]!r} where the opened turn ends in {before[-30:]!r}. Set chat_template to another one or to "
                "plain, or merge_system to true if it is the system message that it moves",
                "the chat template leaves out a part of the assistant's turn",
            )
        return Answer(before, written + self.chat.closing, turn)

    # From pieces of text to token ids.

    def _fitted(self, renderings: Sequence[Sequence[Piece]]) -> list[EncodedRow]:
        """Tokenise renderings, all at once, and cut them to whole turns where they are too long."""
        tokens = self.chat.tokens
        bos = tokens.bos if self.begin_with_bos else []
        found = tokens.ids_of_pieces([[piece.text for piece in pieces] for pieces in renderings])
        return [
            self._joined(pieces, [head if head[:1] == bos else bos + head, *others])
            for pieces, (head, *others) in zip(renderings, found, strict=True)
        ]

    def _joined(self, pieces: Sequence[Piece], ids: Sequence[list[int]]) -> EncodedRow:
        """Join the pieces of a row up to the last answer that fits."""
        joined: list[int] = []
        learnt: list[int] = []
        reference, fitting = "", 0
        for piece, tokens in zip(pieces, ids, strict=True):
            joined += tokens
            if piece.answer is not None and len(joined) <= self.max_length:
                learnt += [len(joined) - len(tokens), len(joined)]
                reference, fitting = self._said(piece), len(joined)
        if not learnt:
            return EncodedRow([], [], "too_long")
        return EncodedRow(
            joined[:fitting], learnt, "whole" if fitting == len(joined) else "truncated", reference=reference
        )

    def _said(self, piece: Piece) -> str:
        """Return what a model that has learnt an answer generates: with the thoughts that the template writes before it."""
        assert piece.answer is not None
        if self.chat.tokens.controls.is_marked(piece.text):
            return str(piece.answer.message["content"])
        return piece.text.removesuffix(self.chat.closing).strip()


def _dense(text: str) -> str:
    """Return a text without white space, which templates are free to arrange."""
    return "".join(text.split())


def _pieces(answers: Sequence[Answer]) -> list[Piece]:
    """Cut a rendering into what is learnt and what is not, up to the last answer that is learnt."""
    pieces: list[Piece] = []
    written = ""
    text = ""
    for answer in answers:
        text += answer.before[len(written) :]
        written = answer.before + answer.written
        if answer.turn.learnt:
            pieces += [Piece(text), Piece(answer.written, answer.turn)]
            text = ""
        else:
            text += answer.written
    return pieces
