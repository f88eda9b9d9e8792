"""Which tokens of a batch are learnt, and at which positions packed documents stand."""

from __future__ import annotations

from torch import Tensor

from grit_lightning.evaluation.choices import IGNORED, position_ids

Batch = dict[str, Tensor]


def packed_positions(batch: Batch) -> Tensor:
    """The batch's own `position_ids` `[B, T]`, with T − 1 on padding, so that no real token goes on from there."""
    positions = batch["position_ids"]
    return positions.masked_fill(batch["attention_mask"] == 0, positions.shape[1] - 1)


def learnt_labels(batch: Batch) -> Tensor:
    """The batch's labels `[B, T]` but for documents' first tokens: before them is padding, another document, or nothing."""
    first = batch.get("position_ids", position_ids(batch["attention_mask"])) == 0
    first[:, 1:] |= batch["attention_mask"][:, :-1] == 0
    return batch["labels"].masked_fill(first, IGNORED)


def trimmed_labels(labels: Tensor) -> Tensor:
    """Cut `[B, T]` labels to the last T' columns, which start one position before the first label of any row."""
    first = int((labels != IGNORED).int().argmax(-1).min())
    return labels[:, max(first - 1, 0) :]


def label_token_count(labels: Tensor) -> Tensor:
    """Number of tokens `[B, T]` that the causal loss is averaged over: labels that have a token before them."""
    return (labels[:, 1:] != IGNORED).sum()
