r"""A chat template: how it writes turns, and how it ends the assistant's.

Templates say nowhere which part of what they write is the assistant's. It is found by writing a conversation with and without
the turn: what is added behind the opened turn is the turn and its end, `<|im_end|>\n` or `<|eot_id|>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from grit_lightning.datamodules.pipeline.text_tokens import TextTokens
from grit_lightning.errors import InvalidValueError

Message = Mapping[str, Any]

CHAT_DATE = "26 Jul 2024"
"""The day that Llama 3's chat template writes into every prompt: its own default, as today's date would change the data."""

_DATE_PARTS = {f"%{letter}": datetime(2024, 7, 26).strftime(f"%{letter}") for letter in "aAbBdHIjmMpSyY"}
_FIXED_DAY = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{part}', '{value}')" for part, value in _DATE_PARTS.items())
    + " }}{% endmacro %}"
)
"""What takes the place of transformers' `strftime_now` in templates that ask for the day."""

_ANSWER = "\U0010fffb"  # no template has it
_PROBE: Sequence[Message] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER})


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, or another one in its place.

    Attributes:
        tokens: The tokenizer.
        template: Jinja text of the template; None for the tokenizer's own.
    """

    tokens: TextTokens
    template: str | None = None

    def write(self, messages: Sequence[Message], *, answered: bool, tools: Sequence[Any] | None = None) -> str:
        """Write messages; open the assistant's turn behind them unless they are answered.

        Args:
            messages: Mappings with `role` and `content`, and whatever else the template reads.
            answered: Whether the last message is the assistant's.
            tools: Descriptions of tools, for templates that write them.

        Raises:
            TemplateError: The template refuses the messages.
        """
        try:
            text = self.tokens.tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                chat_template=self._on_a_fixed_day,
                tokenize=False,
                add_generation_prompt=not answered,
                date_string=CHAT_DATE,
            )
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # of the template's own code
            raise TemplateError(str(error)) from error
        return str(text)

    @property
    def _on_a_fixed_day(self) -> str | None:
        template = self.tokens.tokenizer.chat_template if self.template is None else self.template
        asks = isinstance(template, str) and "strftime_now" in template
        return f"{_FIXED_DAY}{template}" if asks else self.template

    @cached_property
    def last_end(self) -> str:
        """What the template writes behind an answer that is the last message; nothing if it leaves the answer out.

        Raises:
            ValueError: The template cannot write a question and its answer.
        """
        try:
            _, found, end = self.write(_PROBE, answered=True).rpartition(_ANSWER)
        except TemplateError as error:
            raise InvalidValueError(
                f"chat_template: expected one that writes a question and its answer, got {self.name}, which refuses with "
                f"{str(error)!r}. Set another one."
            ) from error
        return end if found else ""

    @cached_property
    def closing(self) -> str:
        """The part of `last_end` that ends the turn: up to its first special token; nothing without one."""
        names = "|".join(map(re.escape, self.tokens.controls.ids))
        found = re.search(names, self.last_end) if names else None
        return self.last_end[: found.end()] if found else ""

    @cached_property
    def stop_ids(self) -> list[int]:
        """The token that ends the assistant's turn; none if the end holds no special token."""
        special = set(self.tokens.controls.ids.values())
        return [id_ for id_ in self.tokens.ids([self.last_end])[0] if id_ in special][:1]

    @cached_property
    def name(self) -> str:
        """What to call it in messages."""
        tokenizer = repr(self.tokens.tokenizer.name_or_path)
        return f"the chat template of {tokenizer}" if self.template is None else "the chat template"
