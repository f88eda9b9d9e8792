"""Rows to token ids: the exact boundary between prompt and answer, and what happens when a row is too long.

Prompt and answer are tokenised apart and joined, so that no token straddles the boundary: a label mask that starts at
`prompt_length` covers the answer and nothing else, and a prompt has the same tokens with and without its answer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grit_lightning.batches import IGNORED
from grit_lightning.datamodules.pipeline.collate import pad
from grit_lightning.datamodules.pipeline.control_tokens import ControlTokens
from grit_lightning.datamodules.pipeline.prompts import PromptTemplate
from grit_lightning.errors import InvalidValueError

Status = Literal["whole", "truncated", "too_long", "invalid"]
"""How a row came through: as it is; with its truncatable column cut; without room for its answer; unusable."""

CHAT_DATE = "26 Jul 2024"
"""The day that Llama 3's chat template writes into every prompt: its own default, as today's date would change the data."""


class EncodedRow(NamedTuple):
    """Token ids of prompt and answer, where the answer starts, and how the row came through."""

    input_ids: list[int]
    prompt_length: int
    status: Status


@dataclass(frozen=True)
class PromptEncoder:
    """Turns rows into token ids under a maximal length.

    Attributes:
        tokenizer: Tokenizer of the backbone.
        template: How a row is written.
        max_length: Upper bound on prompt plus answer, in tokens.
        use_chat_template: Wrap the prompt in the tokenizer's chat template as a user turn; the answer then opens the
            assistant's turn and loses its leading space.
        append_eos: Learn how an answer ends (needed where answers are generated freely): with the end-of-sequence token, or
            with a chat template as that one ends the assistant's turn.
        allow_control_tokens: Let the name of a special token in a row, such as `<|im_end|>`, be that token.
    """

    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    max_length: int
    use_chat_template: bool = False
    append_eos: bool = False
    allow_control_tokens: bool = False

    def __post_init__(self) -> None:
        """Check the settings against the tokenizer.

        Raises:
            ValueError: No chat template though one was asked for, or one that cannot write the template's prompts;
                `max_length` is beyond the tokenizer's maximum; or no token ends an answer that is to have an end.
        """
        if self.use_chat_template and not self.tokenizer.chat_template:
            raise InvalidValueError(
                f"use_chat_template: expected a tokenizer with a chat template, got {self.tokenizer.name_or_path!r}, which has "
                "none. Use the instruct variant of the backbone, or set use_chat_template to false."
            )
        if self.max_length > self.tokenizer.model_max_length:
            raise InvalidValueError(
                f"max_length: expected at most the {self.tokenizer.model_max_length} tokens that the tokenizer "
                f"{self.tokenizer.name_or_path!r} allows, got {self.max_length}. Lower it."
            )
        if self.use_chat_template:
            self._chat([{"role": "user", "content": "a"}])  # refused now, and not at the first row
        if self.append_eos and not self.stop_ids:
            raise InvalidValueError(
                f"append_eos: expected a tokenizer with an eos_token to end answers with, got {self.tokenizer.name_or_path!r}, "
                "which has none. Set its eos_token, or set append_eos to false."
            )

    def encode(self, rows: Sequence[Mapping[str, str]], answers: Sequence[str]) -> list[EncodedRow]:
        """Encode rows together with their answers.

        A row that is too long loses the end of the template's `truncate` column, never anything else. If that is not
        enough, it is returned empty with status "too_long".

        Args:
            rows: Columns of each row, as text.
            answers: The answer of each row.

        Returns:
            One encoded row for each row.
        """
        prompts = self._tokenize([self._prompt(row) for row in rows])
        return [
            self._join(row, prompt, answer)
            for row, prompt, answer in zip(rows, prompts, self.answer_ids(answers), strict=True)
        ]

    def answer_ids(self, answers: Sequence[str], append_eos: bool | None = None) -> list[list[int]]:
        """Return the token ids of answers as they follow a prompt.

        Some tokenizers (SentencePiece) put an extra space token before any text. Each answer is therefore tokenised
        behind an anchor character which is cut off again, as far as the two do not merge.

        Args:
            answers: The answers, before the template is applied.
            append_eos: Overrides the attribute of that name.

        Returns:
            One list of ids for each answer.
        """
        anchor = "\n" if self.use_chat_template else ":"
        texts = [self.template.answer.format(answer=self._plain(answer)) for answer in answers]
        if self.use_chat_template:
            texts = [text.lstrip() for text in texts]
        ends = self.append_eos if append_eos is None else append_eos
        if ends:
            texts = [text + self.turn_end for text in texts]
        head = self._ids([anchor])[0]
        behind = self._ids([anchor + text for text in texts])
        alone = self._ids(texts)
        ids = [b[len(head) :] if b[: len(head)] == head else a for a, b in zip(alone, behind, strict=True)]
        return [[*tokens, self.tokenizer.eos_token_id] for tokens in ids] if ends and not self._turn_end_ids else ids

    @cached_property
    def turn_end(self) -> str:
        """What the chat template writes behind the assistant's answer; nothing without one."""
        if not self.use_chat_template:
            return ""
        answer = "\U0010fffb"  # no template has it
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        _, found, end = self._chat(turns, answered=True).rpartition(answer)
        return end if found else ""

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: of the chat template's end of a turn, or else the end-of-sequence token."""
        eos = self.tokenizer.eos_token_id
        return self._turn_end_ids or ([] if eos is None else [eos])

    @cached_property
    def _turn_end_ids(self) -> list[int]:
        special = set(self._controls.ids.values())
        return [id_ for id_ in self._ids([self.turn_end])[0] if id_ in special][:1]

    def choice_ids(self, choices: Sequence[str]) -> Tensor:
        """Return the token ids of closed answers, without end-of-sequence.

        Args:
            choices: C answers.

        Returns:
            int64 [C, K], padded with -100.

        Raises:
            ValueError: The tokenizer gives two answers the same ids, or one of them none.
        """
        ids = self.answer_ids(choices, append_eos=False)
        if len({tuple(tokens) for tokens in ids}) < len(ids) or not all(ids):
            raise InvalidValueError(
                f"choices: expected token ids of its own for each of {list(choices)}, got {ids} from the tokenizer "
                f"{self.tokenizer.name_or_path!r}. Change the choices, or set another tokenizer."
            )
        return pad([torch.tensor(tokens) for tokens in ids], IGNORED, "right")

    def _join(self, row: Mapping[str, str], prompt: list[int], answer: list[int]) -> EncodedRow:
        budget = self.max_length - len(answer)
        status: Status = "whole"
        if len(prompt) > budget:
            shortened = self._shorten(row, budget)
            if shortened is None:
                return EncodedRow([], 0, "too_long")
            prompt, status = shortened, "truncated"
        return EncodedRow(prompt + answer, len(prompt), status)

    def _shorten(self, row: Mapping[str, str], budget: int) -> list[int] | None:
        """Return the longest prompt within the budget that keeps the beginning of the truncatable column."""
        column = self.template.truncate
        if column is None or not row[column]:
            return None

        def prompt(kept: int) -> list[int]:
            return self._tokenize([self._prompt({**row, column: row[column][:kept]})])[0]

        kept = bisect_right(range(1, len(row[column])), budget, key=lambda kept: len(prompt(kept)))
        return prompt(kept) if kept else None

    def _prompt(self, row: Mapping[str, str]) -> str:
        text = self.template.render({column: self._plain(value) for column, value in row.items()})
        return self._chat([{"role": "user", "content": text}]) if self.use_chat_template else text

    def _plain(self, value: str) -> str:
        """Return a value of a row so that it makes no control tokens."""
        return value if self.allow_control_tokens else self._controls.mark(value)

    @cached_property
    def _controls(self) -> ControlTokens:
        return ControlTokens(self.tokenizer)

    def _chat(self, turns: list[dict[str, str]], answered: bool = False) -> str:
        """Write turns, behind the system message, in the tokenizer's chat template; open the assistant's unless answered."""
        system = [{"role": "system", "content": self.template.system}] if self.template.system else []
        try:
            chat = self.tokenizer.apply_chat_template(
                [*system, *turns], tokenize=False, add_generation_prompt=not answered, date_string=CHAT_DATE
            )
        except TemplateError as error:
            change = "Move its `system` into its `prompt`, or set" if system else "Set"
            raise InvalidValueError(
                f"template: expected one that the chat template of {self.tokenizer.name_or_path!r} can write, got "
                f"{self.template.name!r}, refused with {str(error)!r}. {change} use_chat_template to false."
            ) from error
        return str(chat)

    def _tokenize(self, prompts: list[str]) -> list[list[int]]:
        """Turn prompts into ids, behind a begin-of-sequence token if the tokenizer sets one (chat templates write it)."""
        bos = self.tokenizer.bos_token_id
        leads = bos is not None and not self.use_chat_template and bos in self.tokenizer("").input_ids
        return [[bos, *ids] if leads else ids for ids in self._ids(prompts)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:  # which a tokenizer takes for one text
            return []
        encoded: Any = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        controls = self._controls
        return [
            controls.encode(text) if controls.is_marked(text) else list(ids)
            for text, ids in zip(texts, encoded["input_ids"], strict=True)
        ]
