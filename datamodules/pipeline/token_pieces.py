"""The text of each token of a row, such that the texts together are the row's."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to those before it.

    A token that ends within a character adds nothing; the one that completes the character adds it. Tokenizers that write a
    space before some tokens only when others precede them are read that way too.

    Args:
        tokenizer: Tokenizer of the ids.
        ids: Token ids of a row.
    """
    pieces: list[str] = []
    anchor = known = 0  # what follows `anchor` is decoded anew; up to `known` its text is in `pieces`
    for end in range(1, len(ids) + 1):
        before, after = _text(tokenizer, ids[anchor:known]), _text(tokenizer, ids[anchor:end])
        if after.endswith(_UNFINISHED) and end < len(ids):
            pieces.append("")
            continue
        pieces.append(after[len(before) :])
        anchor, known = known, end
    return pieces


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
