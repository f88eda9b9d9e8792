"""Rows to token ids, and encoded rows to batches.

Prompt and answer meet at `prompt_length` whatever the tokenizer does at the seam; a row that is too long loses the end of one
column and never half a character; special tokens stand where the tokenizer and the chat template put them; batches learn the
answers and mask the rest. Settings that do not fit the tokenizer are refused.
"""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from grit_lightning.datamodules.pipeline.collate import Collator
from grit_lightning.datamodules.pipeline.encoding import PromptEncoder
from grit_lightning.datamodules.pipeline.prompts import PromptTemplate

TEMPLATE = PromptTemplate("{passage}\nQ: {question}\nA:", truncate="passage")
ROW = {"passage": "Ice is cold.", "question": "is it"}
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def encoder(tiny_tokenizer: PreTrainedTokenizerFast) -> PromptEncoder:
    return PromptEncoder(tiny_tokenizer, TEMPLATE, max_length=64)


def llama2_like_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a '▁' before every text, as SentencePiece tokenizers do: ' yes' alone becomes '▁', '▁yes'."""
    pieces = ["▁", ":", "y", "e", "s", "n", "o", "ye", "yes", "▁yes", "no", "▁no"]
    merges = [("y", "e"), ("ye", "s"), ("▁", "yes"), ("n", "o"), ("▁", "no")]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_prompt_and_answer_meet_at_prompt_length(encoder: PromptEncoder) -> None:
    (row,) = encoder.encode([ROW], ["yes"])
    assert encoder.tokenizer.decode(row.input_ids[: row.prompt_length]) == "Ice is cold.\nQ: is it\nA:"
    assert encoder.tokenizer.decode(row.input_ids[row.prompt_length :]) == " yes"
    assert row.status == "whole"


def test_only_the_end_of_the_passage_is_cut_and_no_more_than_needed(encoder: PromptEncoder) -> None:
    passage = "".join(chr(ord("a") + i % 26) for i in range(500))
    (row,) = encoder.encode([{**ROW, "passage": passage}], ["yes"])
    assert row.status == "truncated"
    assert len(row.input_ids) == 64  # one token a byte: the longest cut that fits fills the length exactly
    text = encoder.tokenizer.decode(row.input_ids)
    kept = text.removesuffix("\nQ: is it\nA: yes")
    assert kept != text
    assert passage.startswith(kept)


def test_cutting_never_splits_a_character(encoder: PromptEncoder) -> None:
    (row,) = encoder.encode([{**ROW, "passage": "ж" * 100}], ["yes"])
    text = encoder.tokenizer.decode(row.input_ids)
    assert text.strip("ж") == "\nQ: is it\nA: yes"
    assert 62 <= len(row.input_ids) <= 64


@pytest.mark.parametrize(
    ("row", "template"),
    [
        ({**ROW, "question": "is it so " * 20}, TEMPLATE),
        ({**ROW, "passage": "long " * 20}, PromptTemplate("{passage}{question}")),
    ],
    ids=["question too long", "nothing may be cut"],
)
def test_a_row_that_cannot_be_cut_enough_comes_back_empty(
    tiny_tokenizer: PreTrainedTokenizerFast, row: dict[str, str], template: PromptTemplate
) -> None:
    encoded = PromptEncoder(tiny_tokenizer, template, max_length=64).encode([row, ROW], ["yes", "no"])
    assert [one.status for one in encoded] == ["too_long", "whole"]
    assert encoded[0].input_ids == []


def test_a_leading_space_piece_of_sentencepiece_does_not_enter_the_answer() -> None:
    tokenizer = llama2_like_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer(" yes").input_ids) == ["▁", "▁yes"]
    encoder = PromptEncoder(tokenizer, TEMPLATE, max_length=64)
    ids = encoder.choice_ids(["no", "yes"])
    assert tokenizer.convert_ids_to_tokens(ids[:, 0].tolist()) == ["▁no", "▁yes"]
    assert ids.shape == (2, 1)


def test_begin_of_sequence_leads_the_prompt_only_if_the_tokenizer_sets_it(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = tiny_tokenizer.bos_token_id
    (plain,) = PromptEncoder(tiny_tokenizer, TEMPLATE, 64).encode([ROW], ["yes"])
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    (led,) = PromptEncoder(tiny_tokenizer, TEMPLATE, 64).encode([ROW], ["yes"])
    assert led.input_ids == [bos, *plain.input_ids]
    assert led.prompt_length == plain.prompt_length + 1


def test_end_of_sequence_is_learnt_but_never_scored(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PromptEncoder(tiny_tokenizer, TEMPLATE, 64, append_eos=True)
    (row,) = encoder.encode([ROW], ["yes"])
    assert row.input_ids[-1] == tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.eos_token_id not in encoder.choice_ids(["no", "yes"])


def test_chat_template_wraps_the_prompt_and_the_answer_loses_its_space(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_tokenizer.chat_template = CHAT
    template = PromptTemplate("{question}", system="Be terse.")
    (row,) = PromptEncoder(tiny_tokenizer, template, 64, use_chat_template=True).encode([ROW], ["yes"])
    assert tiny_tokenizer.decode(row.input_ids[: row.prompt_length]) == "[system]Be terse.[user]is it[assistant]"
    assert tiny_tokenizer.decode(row.input_ids[row.prompt_length :]) == "yes"


def test_a_missing_chat_template_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        ValueError, match=r"use_chat_template: expected a tokenizer with a chat template, got .*, which has none"
    ):
        PromptEncoder(tiny_tokenizer, TEMPLATE, 64, use_chat_template=True)


def test_a_length_beyond_the_tokenizers_maximum_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"max_length: expected at most the 128 tokens .*, got 129"):
        PromptEncoder(tiny_tokenizer, TEMPLATE, 129)


def test_answers_with_the_same_tokens_are_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(ValueError, match=r"expected token ids of its own for each of \['no', 'no'\], got \[\["):
        encoder.choice_ids(["no", "no"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_learns_the_answers_and_masks_everything_else(encoder: PromptEncoder, side: str) -> None:
    rows = encoder.encode([ROW, {**ROW, "passage": "Fire is not."}, {**ROW, "passage": "-"}], ["yes", "no", "no"])
    fields = [{"input_ids": r.input_ids, "prompt_length": r.prompt_length, "target": 0} for r in rows]
    batch = Collator(pad_id=0, padding_side=side)(fields)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == (3, max(len(r.input_ids) for r in rows))
    learnt = [labels[labels != -100] for labels in batch["labels"]]
    assert [encoder.tokenizer.decode(ids) for ids in learnt] == [" yes", " no", " no"]
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == row.input_ids
        assert mask[0 if side == "right" else -1] == 1
    torch.testing.assert_close(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])


def test_an_evaluation_batch_carries_choices_and_targets() -> None:
    choices = torch.tensor([[5, -100], [6, 7]])
    rows = [
        {"input_ids": [1, 2, 6, 7], "prompt_length": 2, "target": 1},
        {"input_ids": [1, 5], "prompt_length": 1, "target": 0},
    ]
    batch = Collator(pad_id=0, choice_ids=choices)(rows)
    assert torch.equal(batch["choice_ids"], torch.stack([choices, choices]))
    assert batch["target"].tolist() == [1, 0]
