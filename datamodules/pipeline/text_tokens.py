"""Text to token ids, with the names of special tokens left as text where a row holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from grit_lightning.datamodules.pipeline.control_tokens import ControlTokens


@dataclass(frozen=True)
class TextTokens:
    """A tokenizer for texts that are put together from templates and rows.

    Attributes:
        tokenizer: Tokenizer of the backbone.
        allow_control_tokens: Let the name of a special token in a row, such as `<|im_end|>`, be that token.
    """

    tokenizer: PreTrainedTokenizerBase
    allow_control_tokens: bool = False

    def plain(self, value: Any) -> Any:
        """Return a value of a row, or texts in lists and mappings, so that they make no control tokens."""
        if isinstance(value, str):
            return value if self.allow_control_tokens else self.controls.mark(value)
        if isinstance(value, Mapping):
            return {name: self.plain(each) for name, each in value.items()}
        return [self.plain(each) for each in value] if isinstance(value, list) else value

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts that begin a sequence, without special tokens of the tokenizer's own."""
        if not texts:  # which a tokenizer takes for one text
            return []
        encoded: Any = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [
            self.controls.encode(text) if self.controls.is_marked(text) else list(ids)
            for text, ids in zip(texts, encoded["input_ids"], strict=True)
        ]

    def ids_behind(self, texts: Sequence[str], anchor: str) -> list[list[int]]:
        """Return the token ids of texts that stand behind others.

        Some tokenizers (SentencePiece) put an extra space token before any text. Each text is therefore tokenised behind an
        anchor which is cut off again, as far as the two do not merge.

        Args:
            texts: The texts.
            anchor: A character that could stand before them.
        """
        head = self.ids([anchor])[0]
        behind = self.ids([anchor + text for text in texts])
        alone = self.ids(texts)
        return [b[len(head) :] if b[: len(head)] == head else a for a, b in zip(alone, behind, strict=True)]

    def ids_of_pieces(self, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Return the token ids of the pieces of texts, each text tokenised as a whole, as whoever writes it whole does.

        A token belongs to the piece in which it begins. Where a token that is not special goes over the end of its piece, and
        with a tokenizer that does not say where tokens stand, the pieces are tokenised one behind the other.

        Args:
            texts: Pieces of each text, in order.
        """
        whole = ["".join(pieces) for pieces in texts]
        plain = [
            index for index, text in enumerate(whole) if self.tokenizer.is_fast and not self.controls.is_marked(text)
        ]
        found: dict[int, list[list[int]]] = {}
        if plain:
            encoded: Any = self.tokenizer(
                [whole[index] for index in plain],
                add_special_tokens=False,
                return_attention_mask=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            for index, ids, places in zip(plain, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                if (parts := self._shared_out(texts[index], ids, places)) is not None:
                    found[index] = parts
        others = [index for index in range(len(texts)) if index not in found]
        heads = self.ids([texts[index][0] for index in others])
        rest = iter(self.ids_behind([piece for index in others for piece in texts[index][1:]], "\n"))
        for index, head in zip(others, heads, strict=True):
            found[index] = [head, *(next(rest) for _ in texts[index][1:])]
        return [found[index] for index in range(len(texts))]

    def _shared_out(
        self, pieces: Sequence[str], ids: Sequence[int], places: Sequence[tuple[int, int]]
    ) -> list[list[int]] | None:
        """Share the tokens of a text out to its pieces; None if one of them belongs to two."""
        special = set(self.controls.ids.values())
        ends = list(accumulate(map(len, pieces)))
        parts: list[list[int]] = [[] for _ in pieces]
        piece = 0
        for id_, (start, end) in zip(ids, places, strict=True):
            while piece < len(pieces) - 1 and start >= ends[piece]:
                piece += 1
            if end > ends[piece] and id_ not in special:
                return None
            parts[piece].append(id_)
        return parts

    @property
    def bos(self) -> list[int]:
        """The begin-of-sequence token if the tokenizer sets one before every text, else nothing."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and bos in self.tokenizer("").input_ids else []

    @cached_property
    def controls(self) -> ControlTokens:
        """The special tokens."""
        return ControlTokens(self.tokenizer)
