"""Encoded rows, of a task or of general text alike: token ids, and which of them the model is to predict.

A row is a mapping with `input_ids` (T token ids) and either `learnt` (start, end, start, end …: spans of tokens that are
predicted) or `prompt_length` (all tokens behind it are). That is what `examples(split)` of the data modules gives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grit_lightning.batches import IGNORED
from grit_lightning.datamodules.pipeline.collate import learnt_labels, pad
from grit_lightning.errors import InvalidValueError

Row = Mapping[str, Any]
Rows = Sequence[Row]


def predicted_tokens(row: Row) -> int:
    """Count the tokens of a row that are predicted; the first of all never is."""
    return int((learnt_labels(row)[1:] != IGNORED).sum())


def batches_of(rows: Rows, batch_size: int, device: torch.device) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield batches of `input_ids`, `attention_mask` and `labels`, int64 `[B, T]`, longest rows first, padded on the right.

    Args:
        rows: What to batch.
        batch_size: Rows in a batch.
        device: Where the batches go.

    Yields:
        Indices of the rows, and their batch.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        members = [rows[index] for index in chosen]
        ids = [torch.as_tensor(row["input_ids"]).long() for row in members]
        batch = {
            "input_ids": pad(ids, 0, "right"),
            "attention_mask": pad([torch.ones_like(row) for row in ids], 0, "right"),
            "labels": pad([learnt_labels(row) for row in members], IGNORED, "right"),
        }
        yield chosen, {name: tensor.to(device) for name, tensor in batch.items()}


def require_rows(rows: Rows, what: str, *, vocabulary: int, context: int | None, least_tokens: int = 1) -> None:
    """Check that a model can read rows, and that they say enough.

    Args:
        rows: The rows.
        what: What they are, for the message: `general_rows of wikitext`.
        vocabulary: Number of tokens that the model knows.
        context: The most tokens that it reads at once, None for no limit.
        least_tokens: How many tokens there have to be at least, over all rows.

    Raises:
        ValueError: If there are no rows, one is too long or predicts nothing, an id is not one of the model's, or they hold
            too few tokens.
    """
    if not len(rows):
        raise InvalidValueError(f"{what}: expected rows, got none.")
    longest = max(len(row["input_ids"]) for row in rows)
    if context is not None and longest > context:
        raise InvalidValueError(
            f"{what}: expected at most {context} tokens a row, the model's context, got {longest}. Lower "
            "max_length or block_size."
        )
    counts = [predicted_tokens(row) for row in rows]
    if empty := counts.count(0):
        raise InvalidValueError(
            f"{what}: expected rows that each predict a token, got {empty} of {len(rows)} that predict none. Leave them out."
        )
    smallest, largest = (f(int(f(row["input_ids"])) for row in rows) for f in (min, max))
    if smallest < 0 or largest >= vocabulary:
        raise InvalidValueError(
            f"{what}: expected token ids below {vocabulary}, the model's vocabulary, got "
            f"{smallest if smallest < 0 else largest}. Encode them "
            "with the tokenizer of the adapter's backbone."
        )
    tokens = sum(len(row["input_ids"]) for row in rows)
    if tokens < least_tokens:
        raise InvalidValueError(
            f"{what}: expected at least {least_tokens} tokens, got {tokens} in {len(rows)} rows. Give more rows."
        )


def require_disjoint(calibration: Rows, held_out: Rows, what: str) -> None:
    """Check that no held-out row is one that statistics are taken from, by its tokens.

    Raises:
        ValueError: If one is; the message says how many.
    """
    seen = {_content(row) for row in calibration}
    shared = sum(_content(row) in seen for row in held_out)
    if shared:
        raise InvalidValueError(
            f"{what}: expected held-out rows that are not calibration rows, got {shared} of {len(held_out)} that are. A choice "
            "measured on rows it was fitted to looks better than it is: take others."
        )


def _content(row: Row) -> bytes:
    return hashlib.sha256(torch.as_tensor(row["input_ids"]).long().numpy().tobytes()).digest()
