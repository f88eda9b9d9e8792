"""Control tokens in a text that is not allowed to have any: `<|im_end|>` in a user's question is ten characters.

A tokenizer turns the name of a special token into the token wherever it stands. Whoever writes `<|im_end|>` into a question
could so end the turn and speak as the assistant, and a page of HTML (`<s>`) begins a sequence. Here the template alone makes
control tokens: names in what it is filled with are marked before, and tokenised as ordinary text after. A text without such
names has the tokens it always had.
"""

from __future__ import annotations

import re
import secrets
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from grit_lightning.errors import InvalidValueError

_MARK = "\U0010fffd"  # of a private plane; one that stands in a text is marked itself


class ControlTokens:
    """The special tokens of a tokenizer, and how to write their names without making them.

    Args:
        tokenizer: Any tokenizer; one without a backend of the library `tokenizers` refuses texts with names.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Collect the special tokens."""
        self.tokenizer = tokenizer
        special = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ids: dict[str, int] = dict(sorted(special.items(), key=lambda item: -len(item[0])))
        self._names = [_MARK, *self.ids]
        names = "|".join(map(re.escape, self._names))
        self._name, self._name_or_marked = re.compile(names), re.compile(f"{_MARK}(\\d+){_MARK}|{names}")

    def mark(self, text: str) -> str:
        """Return a text in which names of special tokens are marked, to be written into a template."""
        return self._name.sub(lambda match: f"{_MARK}{self._names.index(match[0])}{_MARK}", text)

    def is_marked(self, text: str) -> bool:
        """Return whether a text, or what was written into it, had such names."""
        return _MARK in text

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text: unmarked names are special tokens, marked ones are the text that they are.

        Raises:
            ValueError: The tokenizer has no backend to ask.
        """
        # The tokens that the template makes get other names, which no text can know; then real names mean nothing.
        text = self._name_or_marked.sub(
            lambda match: self._aliases[match[0]] if match[1] is None else self._names[int(match[1])], text
        )
        return [self._originals.get(id_, id_) for id_ in self._backend.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _aliases(self) -> dict[str, str]:
        secret = secrets.token_hex(8)
        return {name: f"\U0010fffc{secret}-{index}\U0010fffc" for index, name in enumerate(self.ids)}

    @cached_property
    def _originals(self) -> dict[int, int]:
        aliases = self._backend.get_vocab()
        return {aliases[alias]: self.ids[name] for name, alias in self._aliases.items()}

    @cached_property
    def _backend(self) -> Tokenizer:
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InvalidValueError(
                f"allow_control_tokens: expected a fast tokenizer, to write the names of special tokens as text, got "
                f"{self.tokenizer.name_or_path!r}, which is none. Set another tokenizer, or allow_control_tokens to true"
            )
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        known = {token.content: token for token in self.tokenizer.added_tokens_decoder.values()}
        for name, alias in self._aliases.items():
            options = {
                option: getattr(known[name], option) for option in ("single_word", "lstrip", "rstrip", "normalized")
            }
            copy.add_tokens([AddedToken(alias, **options)])
        return copy
