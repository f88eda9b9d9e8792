"""Rows to token ids: the exact boundary between prompt and answer, and what happens when a row is too long.

Prompt and answer are tokenised apart and joined, so that no token straddles the boundary: a label mask that starts at
`prompt_length` covers the answer and nothing else, and a prompt has the same tokens with and without its answer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grit_lightning.batches import IGNORED
from grit_lightning.datamodules.pipeline.chat_template import ChatTemplate
from grit_lightning.datamodules.pipeline.collate import pad
from grit_lightning.datamodules.pipeline.prompts import PromptTemplate
from grit_lightning.datamodules.pipeline.text_tokens import TextTokens
from grit_lightning.datamodules.pipeline.tokenized import EncodedRow, Status
from grit_lightning.errors import InvalidValueError


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
            self._in_chat("a")  # refused now, and not at the first row
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

        Args:
            answers: The answers, before the template is applied.
            append_eos: Overrides the attribute of that name.

        Returns:
            One list of ids for each answer.
        """
        texts = [self.template.answer.format(answer=self.tokens.plain(answer)) for answer in answers]
        if self.use_chat_template:
            texts = [text.lstrip() for text in texts]
        ends = self.append_eos if append_eos is None else append_eos
        if ends and self.use_chat_template:
            texts = [text + self.chat.last_end for text in texts]
        ids = self.tokens.ids_behind(texts, "\n" if self.use_chat_template else ":")
        eos = self.tokenizer.eos_token_id
        return [[*tokens, eos] for tokens in ids] if ends and not self._turn_end_ids else ids

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: of the chat template's end of a turn, or else the end-of-sequence token."""
        eos = self.tokenizer.eos_token_id
        return self._turn_end_ids or ([] if eos is None else [eos])

    @property
    def _turn_end_ids(self) -> list[int]:
        return self.chat.stop_ids if self.use_chat_template else []

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
                return EncodedRow([], [], "too_long")
            prompt, status = shortened, "truncated"
        return EncodedRow(prompt + answer, [len(prompt), len(prompt) + len(answer)], status)

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
        text = self.template.render({column: self.tokens.plain(value) for column, value in row.items()})
        return self._in_chat(text) if self.use_chat_template else text

    @cached_property
    def tokens(self) -> TextTokens:
        """The tokenizer, for texts of which a part comes from rows."""
        return TextTokens(self.tokenizer, self.allow_control_tokens)

    @cached_property
    def chat(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.tokens)

    def _in_chat(self, text: str) -> str:
        """Write a prompt as the user's turn, behind the system message, and open the assistant's."""
        system = [{"role": "system", "content": self.template.system}] if self.template.system else []
        try:
            return self.chat.write([*system, {"role": "user", "content": text}], answered=False)
        except TemplateError as error:
            change = "Move its `system` into its `prompt`, or set" if system else "Set"
            raise InvalidValueError(
                f"template: expected one that the chat template of {self.tokenizer.name_or_path!r} can write, got "
                f"{self.template.name!r}, refused with {str(error)!r}. {change} use_chat_template to false."
            ) from error

    def _tokenize(self, prompts: list[str]) -> list[list[int]]:
        """Turn prompts into ids, behind a begin-of-sequence token if the tokenizer sets one (chat templates write it)."""
        bos = [] if self.use_chat_template else self.tokens.bos
        return [[*bos, *ids] for ids in self.tokens.ids(prompts)]
