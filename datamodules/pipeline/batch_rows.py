"""The rows in the batches of any loader: token ids without padding, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from grit_lightning.batches import IGNORED
from grit_lightning.datamodules.pipeline.row_numbers import TokenRows
from grit_lightning.errors import InvalidValueError


def rows_of_batches(batches: Iterable[Any]) -> tuple[TokenRows, list[list[int]]]:
    """Take batches apart.

    Args:
        batches: Mappings with `input_ids` and `labels`, int64 [B, T], and `attention_mask` if there is padding.

    Returns:
        The rows, and the tokens of each row of each batch.

    Raises:
        ValueError: A batch is anything else.
    """
    tokens, learnt, lengths = [], [], []
    for batch in batches:
        ids, mask, labels = _columns(batch)
        rows = [(row[real], label[real]) for row, real, label in zip(ids, mask, labels, strict=True)]
        tokens += [row.astype(np.int32) for row, _ in rows]
        learnt += [_spans(label != IGNORED) for _, label in rows]
        lengths.append([len(row) for row, _ in rows])
    prompts = [spans[-2] if spans else 0 for spans in learnt]
    return TokenRows(tokens, learnt, prompts, [-1] * len(tokens)), lengths


def _columns(batch: Any) -> tuple[Any, Any, Any]:
    names = ("input_ids", "labels")
    if not isinstance(batch, Mapping) or not all(isinstance(batch.get(name), Tensor) for name in names):
        found = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise InvalidValueError(
            f"data: expected batches with input_ids and labels, as tensors [rows, tokens], got {found}. `grit data` can show "
            "no others."
        )
    ids, labels = (batch[name].cpu().numpy() for name in names)
    mask = batch.get("attention_mask")
    return ids, np.ones_like(ids, dtype=bool) if mask is None else mask.cpu().numpy().astype(bool), labels


def _spans(learnt: Any) -> list[int]:
    """Return start, end, start, end … of the runs of true."""
    steps = np.diff(np.concatenate([[0], learnt.astype(np.int8), [0]]))
    return [int(position) for position in np.flatnonzero(steps)]
