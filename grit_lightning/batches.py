"""What a batch is: which tokens are real, which are learnt, where documents and answers begin.

A batch is a dict of `input_ids`, `attention_mask` and `labels`, int64 `[B, T]`; see `GritLitModule` for its other keys.

Shapes: B rows, T tokens, P tokens of the longest prompt. Padding may be on either side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]

IGNORED = -100
"""Label of a token that is not learnt, and padding of closed answers: the value that torch's cross-entropy skips."""


def position_ids(attention_mask: Tensor) -> Tensor:
    """Count the real tokens before each token of its row, so that left padding does not shift them.

    Args:
        attention_mask: `[B, T]`, 1 for real tokens.

    Returns:
        int64 `[B, T]`; 0 on leading padding.

    Example:
        >>> position_ids(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])).tolist()
        [[0, 0, 0, 1], [0, 1, 2, 2]]
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def packed_positions(batch: Batch) -> Tensor:
    """Return the batch's own `position_ids` `[B, T]`, with T − 1 on padding, so that no real token goes on from there."""
    positions = batch["position_ids"]
    return positions.masked_fill(batch["attention_mask"] == 0, positions.shape[1] - 1)


def learnt_labels(batch: Batch) -> Tensor:
    """Return the labels `[B, T]` without documents' first tokens: before them is padding, another document, or nothing."""
    first = batch.get("position_ids", position_ids(batch["attention_mask"])) == 0
    first[:, 1:] |= batch["attention_mask"][:, :-1] == 0
    return batch["labels"].masked_fill(first, IGNORED)


def trimmed_labels(labels: Tensor) -> Tensor:
    """Cut `[B, T]` labels to the last T' columns, which start one position before the first label of any row."""
    first = int(answer_start(labels).min())
    return labels[:, max(first - 1, 0) :]


def model_inputs(
    batch: Batch, accepted: frozenset[str], *, with_loss: bool = True, trim: bool = False
) -> dict[str, Any]:
    """Turn a batch into the arguments of a model's forward pass.

    Args:
        batch: As `GritLitModule` says.
        accepted: Names of the arguments that the model takes.
        with_loss: Have the mean loss over label tokens computed.
        trim: Have logits computed only from the position before the first label of the batch on, if the model can.
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if "position_ids" in accepted:
        inputs["position_ids"] = position_ids(batch["attention_mask"])
    if "position_ids" in batch:
        # transformers keeps documents apart where positions do not go up by one, but only without a mask: padding gets a
        # position that nothing can follow.
        inputs["position_ids"] = packed_positions(batch)
        del inputs["attention_mask"]
    labels = learnt_labels(batch)
    if trim and "logits_to_keep" in accepted:
        labels = trimmed_labels(labels)
        inputs["logits_to_keep"] = labels.shape[1]
    return {**inputs, "labels": labels} if with_loss else inputs


def counted_rows(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which rows of an evaluation batch count, bool `[B]`: all but those whose `row` is −1, which fill it up."""
    return batch["row"] >= 0 if "row" in batch else torch.ones_like(batch["labels"][:, 0], dtype=torch.bool)


def label_token_count(labels: Tensor) -> Tensor:
    """Count the tokens of `[B, T]` that the causal loss is averaged over: labels that have a token before them."""
    return (labels[:, 1:] != IGNORED).sum()


def answer_start(labels: Tensor) -> Tensor:
    """Find the column of each row's first label, int64 `[B]`; 0 for a row without any."""
    return (labels != IGNORED).int().argmax(-1)


def last_answer_start(labels: Tensor) -> Tensor:
    """Find the column where each row's last run of labels begins, int64 `[B]`; 0 for a row without any.

    Args:
        labels: int64 `[B, T]`; a conversation has a run of labels for each answer.

    Example:
        >>> last_answer_start(torch.tensor([[-100, 5, -100, 6, 7], [-100, -100, 8, 9, -100]])).tolist()
        [3, 2]
    """
    learnt = labels != IGNORED
    begins = learnt.clone()
    begins[:, 1:] &= ~learnt[:, :-1]
    columns = torch.arange(labels.shape[1], device=labels.device)
    return (columns * begins).max(-1).values


def left_padded_prompts(input_ids: Tensor, attention_mask: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Move prompts to the right end of their rows, whatever the padding of the batch.

    Args:
        input_ids: int64 `[B, T]`.
        attention_mask: `[B, T]`.
        start: int64 `[B]`, the column behind each prompt's last token, as `answer_start` finds it.

    Returns:
        Prompts `[B, P]` and their mask, all ending in the last column.
    """
    longest = int(start.max())
    columns = start[:, None] - longest + torch.arange(longest, device=start.device)
    inside = columns.clamp(min=0)
    return input_ids.gather(1, inside), attention_mask.gather(1, inside) * (columns >= 0)
