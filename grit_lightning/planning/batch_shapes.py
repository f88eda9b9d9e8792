"""The micro-batches that matter for memory: the largest of the data's first epoch, and the largest that settings allow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import datasets

from grit_lightning.errors import InvalidValueError
from grit_lightning.planning.rehearsal import MicroBatch


@runtime_checkable
class HasExamples(Protocol):
    """A data module whose training rows are encoded, one document each."""

    batch_size: int
    packing: bool

    def examples(self, split: Any) -> datasets.Dataset:
        """Return the encoded rows of a split."""

    def train_dataloader(self) -> Any:
        """Return the loader of the training rows."""


def largest_allowed(datamodule: object) -> MicroBatch:
    """Return the largest micro-batch that the settings allow: full rows whose every position is learnt.

    Raises:
        ValueError: If the data module does not say how many rows and tokens that is.
    """
    rows, tokens = getattr(datamodule, "batch_size", None), getattr(datamodule, "max_length", None)
    if not isinstance(rows, int) or not isinstance(tokens, int):
        raise InvalidValueError(
            "data: expected a data module with `batch_size` and `max_length`, from which the memory of a micro-batch is "
            f"reckoned, got a {type(datamodule).__name__} without. Give it both attributes."
        )
    return MicroBatch(rows, tokens, packed=bool(getattr(datamodule, "packing", False)))


def largest_of_first_epoch(datamodule: object) -> list[MicroBatch]:
    """Return the micro-batches of the first epoch that take most: by tokens, and by positions from the first label on.

    Args:
        datamodule: A data module, set up for training.

    Returns:
        One or two shapes; what the settings allow where rows are packed, or are no rows with one document each.
    """
    if not isinstance(datamodule, HasExamples) or datamodule.packing:
        return [largest_allowed(datamodule)]
    rows, order = datamodule.examples("train"), iter(datamodule.train_dataloader().sampler)
    lengths, prompts = rows["length"][:], _prompts(rows)
    batches = [
        MicroBatch(len(batch), max(lengths[row] for row in batch), min(prompts[row] for row in batch))
        for batch in _batched(order, datamodule.batch_size)
    ]
    by_tokens = max(batches, key=lambda batch: (batch.rows * batch.tokens, -batch.prompt))
    by_labels = max(batches, key=lambda batch: (batch.rows * (batch.tokens - batch.prompt), batch.tokens))
    return list(dict.fromkeys([by_tokens, by_labels]))


def _prompts(rows: datasets.Dataset) -> Sequence[int]:
    """Tokens before the first label of each row."""
    if "learnt" not in rows.column_names:
        prompts: Sequence[int] = rows["prompt_length"][:]
        return prompts
    return [spans[0] for spans in rows["learnt"][:]]


def _batched(items: Iterable[int], size: int) -> Iterator[list[int]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
