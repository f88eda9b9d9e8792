"""Encoded rows to padded batches: tensors only, so that data-loader workers never touch the tokenizer.

Shapes: B rows, T tokens of the longest row in the batch, C answer choices, K tokens of the longest choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from grit_lightning.batches import IGNORED


def pad(rows: Sequence[Tensor], value: int, side: Literal["left", "right"]) -> Tensor:
    """Stack rows of unequal length.

    Args:
        rows: B tensors [T_i].
        value: What fills the short ones.
        side: Where it is put.

    Returns:
        [B, max T_i], of the rows' dtype.

    Example:
        >>> pad([torch.tensor([1]), torch.tensor([2, 3])], 0, "left").tolist()
        [[0, 1], [2, 3]]
    """
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


def learnt_labels(row: Mapping[str, Any]) -> Tensor:
    """Return the labels int64 [T] of an encoded row: its tokens within the spans of `learnt`, -100 elsewhere.

    Args:
        row: With `input_ids`, and `learnt` (start, end, start, end …) or `prompt_length`, behind which all is learnt.

    Example:
        >>> learnt_labels({"input_ids": [1, 2, 3, 4], "learnt": [1, 2, 3, 4]}).tolist()
        [-100, 2, -100, 4]
    """
    tokens = torch.as_tensor(row["input_ids"]).long()
    labels = torch.full_like(tokens, IGNORED)
    spans = row["learnt"] if "learnt" in row else [row["prompt_length"], len(tokens)]
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = tokens[start:end]
    return labels


@dataclass(frozen=True)
class Collator:
    """Pads encoded rows to the longest of the batch and masks what is not learnt out of the labels.

    Attributes:
        pad_id: Token that fills short rows; its value is masked everywhere.
        padding_side: "right" or "left".
        choice_ids: Tokens of the closed answers [C, K], padded with -100; given for evaluation only, and then every
            batch also carries `choice_ids` and `target`.
    """

    pad_id: int
    padding_side: Literal["left", "right"] = "right"
    choice_ids: Tensor | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            rows: Each as for `learnt_labels`; for evaluation also with `row` and `target`. Packed rows have `input_ids`,
                `labels` and `position_ids`.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each int64 [B, T]; labels are -100 on padding and on what is not
            learnt. With `choice_ids` set also `choice_ids` int64 [B, C, K] and `target` int64 [B], the index of the right
            choice. Rows that carry their `row` number give `row` int64 [B], packed ones `position_ids` int64 [B, T].
        """
        sequences = [torch.as_tensor(row["input_ids"]).long() for row in rows]
        labels = [row["labels"] if "labels" in row else learnt_labels(row) for row in rows]
        batch = {
            "input_ids": pad(sequences, self.pad_id, self.padding_side),
            "attention_mask": pad([torch.ones_like(sequence) for sequence in sequences], 0, self.padding_side),
            "labels": pad(labels, IGNORED, self.padding_side),
        }
        if "position_ids" in rows[0]:
            batch["position_ids"] = pad([row["position_ids"] for row in rows], 0, self.padding_side)
        if "row" in rows[0]:
            batch["row"] = torch.tensor([row["row"] for row in rows], dtype=torch.long)
        if self.choice_ids is not None:
            batch["choice_ids"] = self.choice_ids.expand(len(rows), -1, -1).contiguous()
            batch["target"] = torch.tensor([row["target"] for row in rows], dtype=torch.long)
        return batch
