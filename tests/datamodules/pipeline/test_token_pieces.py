"""The texts of tokens, one by one, are the text of the row."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grit_lightning.datamodules.pipeline.token_pieces import token_pieces

from ..chat_families import CHAT_FAMILIES, chat_tokenizer


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral_v3", "qwen3"])
def test_the_pieces_of_a_rendering_are_the_rendering(name: str) -> None:
    family, tokenizer = CHAT_FAMILIES[name], chat_tokenizer(name)
    ids = tokenizer(family.rendering, add_special_tokens=False)["input_ids"]

    pieces = token_pieces(tokenizer, ids)

    assert "".join(pieces) == family.rendering
    assert len(pieces) == len(ids)
    assert pieces[0] == family.rendering[: len(pieces[0])]


def test_a_character_of_several_tokens_stands_with_its_last_one(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tiny_tokenizer("a×🙂b", add_special_tokens=False)["input_ids"]

    assert token_pieces(tiny_tokenizer, ids) == ["a", "", "×", "", "", "", "🙂", "b"]


def test_a_row_that_ends_within_a_character_loses_no_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tiny_tokenizer("a×", add_special_tokens=False)["input_ids"][:-1]

    assert token_pieces(tiny_tokenizer, ids) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_a_space_that_a_token_has_only_behind_others_is_kept() -> None:
    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")

    assert token_pieces(tokenizer, tokenizer("a b a")["input_ids"]) == ["a", " b", " a"]
