"""What a model will see of a data module: its splits in numbers, an epoch of its training batches, and single rows.

Everything returned is made of plain values, ready for JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from grit_lightning.datamodules.mixture import MixtureDataModule
from grit_lightning.datamodules.pipeline.packing import PackedRows
from grit_lightning.datamodules.pipeline.row_numbers import TokenRows, overlap, padding_share, split_in_numbers
from grit_lightning.datamodules.pipeline.rows import RowsDataModule
from grit_lightning.datamodules.pipeline.task_table import Split
from grit_lightning.datamodules.pipeline.token_pieces import token_pieces


@dataclass(frozen=True)
class SeenTask:
    """The rows of a task by split, and what is needed to speak of them.

    Attributes:
        rows: Rows of each split, training rows first.
        tokenizer: What made their tokens; None if nobody knows.
        source: Where they come from.
        max_length: Upper bound on their tokens; None for none.
        choices: Closed answers; empty for free ones.
        stop_ids: Tokens that end an answer.
        problems: For each split, what happened to rows that did not fit or could not be used, and to how many.
        cut: Rows of each split that lost a part.
        left_out: Rows of each split that are missing.
    """

    rows: Mapping[str, TokenRows]
    tokenizer: PreTrainedTokenizerBase | None
    source: str | None = None
    max_length: int | None = None
    choices: Sequence[str] = ()
    stop_ids: Sequence[int] | None = None
    problems: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    cut: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, task: RowsDataModule, splits: Iterable[Split]) -> SeenTask:
        """Read the rows of a data module, of splits that are set up."""
        return cls(
            {split: TokenRows.of(task.examples(split)) for split in splits},
            task.tokenizer,
            task.source,
            task.max_length,
            task.choices,
            task.stop_ids,
            task.problems,
            task.truncated,
            task.dropped,
        )

    def report(self) -> dict[str, Any]:
        """Return the splits in numbers, and what the held-out ones share with the training rows."""
        unknown = None if self.tokenizer is None else self.tokenizer.unk_token_id
        splits = {
            split: split_in_numbers(rows, self.choices, self.stop_ids, unknown)
            | {"cut": self.cut.get(split, 0), "left_out": self.left_out.get(split, 0)}
            | {"problems": dict(self.problems.get(split, {}))}
            for split, rows in self.rows.items()
        }
        held_out = [split for split in self.rows if split != "train"]
        shared = {split: overlap(self.rows["train"], self.rows[split]) for split in held_out}
        return {"source": self.source, "max_length": self.max_length, "splits": splits, "overlap": shared}

    def shown(self, split: str, count: int) -> list[dict[str, Any]]:
        """Return the first rows of a split, token by token.

        Returns:
            For each row its number in the split, the text of each token (its id if there is no tokenizer), and the spans that
            are learnt: start, end, start, end …
        """
        rows = self.rows[split]
        return [
            {
                "split": split,
                "row": number,
                "tokens": [str(token) for token in tokens]
                if self.tokenizer is None
                else token_pieces(self.tokenizer, tokens.tolist()),
                "learnt": [int(end) for end in learnt],
            }
            for number, (tokens, learnt) in enumerate(islice(zip(rows.tokens, rows.learnt, strict=True), count))
        ]


def epoch_report(
    batches: Iterable[Sequence[int]], in_a_process: int | None, processes: int, accumulated: int
) -> dict[str, Any]:
    """Return what an epoch holds.

    Args:
        batches: Tokens of each row of each batch, of all processes.
        in_a_process: Batches that a process trains on in an epoch; None if it never ends.
        processes: Number of processes.
        accumulated: Batches of an optimizer step in a process.
    """
    known = [list(lengths) for lengths in batches]
    return {
        "processes": processes,
        "batches": in_a_process,
        "batches_per_step": accumulated,
        "optimizer_steps": None if in_a_process is None else math.ceil(in_a_process / accumulated),
        "rows": sum(map(len, known)),
        "tokens": sum(map(sum, known)),
        "padding_share": padding_share(known),
    }


def batches_of_epoch(
    datamodule: RowsDataModule | MixtureDataModule, loader: DataLoader[Any], processes: int, limit: int
) -> Iterator[list[int]]:
    """Go through the batches of the first epoch in all processes, without reading a row.

    Args:
        datamodule: The data module, set up.
        loader: Its training loader.
        processes: Number of processes.
        limit: Batches of an epoch in each.

    Yields:
        Tokens of each row of a batch.
    """
    lengths = _row_lengths(datamodule)
    for process in range(processes):
        loader.sampler.rank = process  # type: ignore[attr-defined]  # a DistributedSampler
        for numbers in islice(loader.batch_sampler or (), limit):
            yield [lengths[number] for number in numbers]


def _row_lengths(datamodule: RowsDataModule | MixtureDataModule) -> list[int]:
    """Return the tokens of each row that a training loader reads, with all documents that are packed in it."""
    if isinstance(datamodule, MixtureDataModule):
        return [length for task in datamodule.tasks.values() for length in _row_lengths(task)]
    rows, lengths = datamodule.training_rows()
    return [sum(lengths[number] for number in pack) for pack in rows.packs] if isinstance(rows, PackedRows) else lengths
