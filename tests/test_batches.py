"""What a batch is, token by token: positions, labels that are learnt, prompts, and what a model is called with."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor

from grit_lightning import batches
from grit_lightning.batches import (
    IGNORED,
    answer_start,
    counted_rows,
    label_token_count,
    learnt_labels,
    left_padded_prompts,
    model_inputs,
    position_ids,
    trimmed_labels,
)

EVERYTHING = frozenset({"position_ids", "logits_to_keep"})


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Two rows, padded on either side, with two label tokens each."""
    ids = torch.tensor([[0, 0, 11, 12, 13, 14], [21, 22, 23, 24, 25, 0]])
    labels = torch.tensor([[-100, -100, -100, -100, 13, 14], [-100, -100, -100, 24, 25, -100]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def test_examples_in_docstrings_hold() -> None:
    result = doctest.testmod(batches)
    assert result.attempted > 0
    assert result.failed == 0


def test_positions_count_real_tokens_only() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    positions = position_ids(mask)
    real = [row[kept.bool()].tolist() for row, kept in zip(positions, mask, strict=True)]
    assert real == [[0, 1, 2], [0, 1, 2], [0, 1, 2, 3, 4]]
    assert positions.min() == 0


def test_the_first_token_of_a_document_is_never_learnt() -> None:
    ids = torch.tensor([[0, 5, 6, 7, 8, 9]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, IGNORED)}
    assert learnt_labels(batch).tolist() == [[-100, -100, 6, 7, 8, 9]]  # 5 comes behind padding
    batch["position_ids"] = torch.tensor([[0, 0, 1, 0, 1, 2]])  # two documents: 5 6 and 7 8 9
    assert learnt_labels(batch).tolist() == [[-100, -100, 6, -100, 8, 9]]
    batch["position_ids"] = torch.arange(6)[None]  # padding is counted: 5 has a position, but still nothing before it
    assert learnt_labels(batch).tolist() == [[-100, -100, 6, 7, 8, 9]]


def test_trimmed_labels_begin_one_position_before_the_first_label_of_any_row(batch: dict[str, Tensor]) -> None:
    trimmed = trimmed_labels(batch["labels"])
    assert torch.equal(trimmed, batch["labels"][:, 2:])
    assert label_token_count(trimmed) == label_token_count(batch["labels"]) == 4
    everywhere = torch.full((1, 3), 7)
    assert torch.equal(trimmed_labels(everywhere), everywhere)
    assert label_token_count(everywhere) == 2  # nothing comes before the first


def test_prompts_end_in_the_last_column_whatever_their_padding(batch: dict[str, Tensor]) -> None:
    start = answer_start(batch["labels"])
    assert start.tolist() == [4, 3]
    prompts, mask = left_padded_prompts(batch["input_ids"], batch["attention_mask"], start)
    assert [row[kept.bool()].tolist() for row, kept in zip(prompts, mask, strict=True)] == [[11, 12], [21, 22, 23]]
    assert mask[:, -1].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("accepted", "options", "names"),
    [
        (EVERYTHING, {}, {"input_ids", "attention_mask", "position_ids", "labels"}),
        (frozenset(), {"trim": True}, {"input_ids", "attention_mask", "labels"}),
        (EVERYTHING, {"trim": True}, {"input_ids", "attention_mask", "position_ids", "logits_to_keep", "labels"}),
        (EVERYTHING, {"with_loss": False}, {"input_ids", "attention_mask", "position_ids"}),
    ],
)
def test_a_model_gets_only_arguments_that_it_takes(
    batch: dict[str, Tensor], accepted: frozenset[str], options: dict[str, bool], names: set[str]
) -> None:
    inputs = model_inputs({**batch, "something else": batch["labels"]}, accepted, **options)
    assert inputs.keys() == names
    if "labels" in inputs and "logits_to_keep" in inputs:
        assert inputs["logits_to_keep"] == inputs["labels"].shape[1] == 4


def test_packed_documents_go_by_their_positions_and_padding_follows_no_token(batch: dict[str, Tensor]) -> None:
    positions = torch.tensor([[0, 0, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3]])
    inputs = model_inputs({**batch, "position_ids": positions}, EVERYTHING)
    assert "attention_mask" not in inputs
    assert inputs["position_ids"].tolist() == [[5, 5, 0, 1, 0, 1], [0, 1, 0, 1, 2, 5]]


def test_rows_that_fill_up_a_batch_are_not_counted(batch: dict[str, Tensor]) -> None:
    assert counted_rows(batch).tolist() == [True, True]
    assert counted_rows({**batch, "row": torch.tensor([3, -1])}).tolist() == [True, False]
