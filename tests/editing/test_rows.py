"""Rows as batches: what is predicted, padding, and what is refused."""

from __future__ import annotations

import pytest
import torch

from grit_lightning.editing.rows import batches_of, predicted_tokens, require_disjoint, require_rows


def test_the_first_token_is_never_predicted() -> None:
    assert predicted_tokens({"input_ids": [5, 6, 7], "learnt": [0, 3]}) == 2
    assert predicted_tokens({"input_ids": [5, 6, 7, 8], "learnt": [0, 1, 3, 4]}) == 1
    assert predicted_tokens({"input_ids": [5, 6, 7], "prompt_length": 2}) == 1
    assert predicted_tokens({"input_ids": [5, 6, 7], "learnt": []}) == 0


def test_the_longest_rows_come_first_and_padding_is_masked() -> None:
    rows = [{"input_ids": [5, 6], "learnt": [1, 2]}, {"input_ids": [7, 8, 9], "prompt_length": 1}]
    (chosen, batch), (rest, _) = batches_of([*rows, rows[0]], 2, torch.device("cpu"))
    assert (chosen, rest) == ([1, 0], [2])
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 6, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 8, 9], [-100, 6, -100]]


def test_rows_that_a_model_cannot_read_are_refused() -> None:
    row = {"input_ids": [5, 6, 7], "learnt": [1, 3]}
    require_rows([row], "rows", vocabulary=8, context=3, least_tokens=2)
    for limits, message in (
        ({"vocabulary": 7, "context": 3}, "token ids below 7.*got 7"),
        ({"vocabulary": 8, "context": 2}, "at most 2 tokens a row.*got 3"),
        ({"vocabulary": 8, "context": None, "least_tokens": 4}, "at least 4 tokens, got 3 in 1 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            require_rows([row], "rows", **limits)  # type: ignore[arg-type]


def test_a_row_is_known_by_its_tokens() -> None:
    seen = [{"input_ids": [5, 6, 7], "learnt": [1, 3]}]
    require_disjoint(seen, [{"input_ids": [5, 6], "learnt": [1, 2]}], "rows")
    with pytest.raises(ValueError, match="rows: expected held-out rows that are not calibration rows, got 1 of 1"):
        require_disjoint(seen, [{"input_ids": torch.tensor([5, 6, 7]), "prompt_length": 2}], "rows")
