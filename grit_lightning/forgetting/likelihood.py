"""Log-likelihoods of token sequences under a causal language model, divided among processes.

Shapes: N sequences, B of them in a batch, T tokens of the longest in it, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from grit_lightning.batches import IGNORED
from grit_lightning.datamodules.pipeline.collate import pad


class TokenSequence(NamedTuple):
    """Token ids, and the position of the first one whose likelihood counts.

    What comes before is context only. A sequence's first token is never predicted: `start` is at least 1.
    """

    ids: list[int]
    start: int = 1

    @property
    def scored(self) -> int:
        """Number of tokens whose likelihood counts."""
        return len(self.ids) - self.start

    def last(self, tokens: int) -> TokenSequence:
        """Return the sequence's last `tokens` tokens; what is cut is context first."""
        cut = max(len(self.ids) - tokens, 0)
        return TokenSequence(self.ids[cut:], max(self.start - cut, 1))


@torch.no_grad()
def log_likelihoods(
    logits_of: Callable[[dict[str, Tensor]], Tensor],
    sequences: Sequence[TokenSequence],
    batch_size: int,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """Score this process's share of the sequences, longest first and right-padded.

    Every process calls the model equally often, even if the sequences do not divide evenly: some models communicate in
    their forward pass.

    Args:
        logits_of: Logits `[B, T', V]` for the last T' ≤ T positions of a batch of `input_ids`, `attention_mask` and
            `labels`, each int64 `[B, T]`; labels are −100 where a token does not count.
        sequences: The same on every process.
        batch_size: Sequences in a forward pass.
        device: Device of the batches.
        rank: Rank of this process.
        world_size: Number of processes.

    Returns:
        `[N]`, float32 or better: log-likelihoods in nats, summed over the tokens that count; 0 for sequences of other
        processes, so that the sum over processes is complete.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    own = order[rank::world_size]
    calls = -(-len(sequences) // (world_size * batch_size))
    scores: dict[int, Tensor] = {}
    for call in range(calls):
        chosen = own[call * batch_size : (call + 1) * batch_size]
        batch = make_batch([sequences[i] for i in chosen or order[-1:]], device)  # with none left, still take part
        logits = logits_of(batch)
        scores.update(zip(chosen, row_log_likelihoods(logits, batch["labels"]), strict=False))
    return torch.stack([scores[i] if i in scores else torch.zeros((), device=device) for i in range(len(sequences))])


def make_batch(sequences: Sequence[TokenSequence], device: torch.device) -> dict[str, Tensor]:
    """Stack sequences into `input_ids`, `attention_mask` and `labels`, int64 `[B, T]`, padded on the right."""
    ids = [torch.tensor(sequence.ids) for sequence in sequences]
    labels = [torch.tensor([IGNORED] * sequence.start + sequence.ids[sequence.start :]) for sequence in sequences]
    batch: Mapping[str, Tensor] = {
        "input_ids": pad(ids, 0, "right"),
        "attention_mask": pad([torch.ones_like(row) for row in ids], 0, "right"),
        "labels": pad(labels, IGNORED, "right"),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def row_log_likelihoods(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Return each row's log-likelihood of its labels, in nats.

    Row by row, as float32 logits of a whole batch can take gigabytes.

    Args:
        logits: `[B, T', V]` for the last T' ≤ T positions.
        labels: int64 `[B, T]`, −100 where a token does not count.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    labels = labels[:, labels.shape[1] - logits.shape[1] :]
    return [
        -cross_entropy(row[:-1].to(dtype), label[1:], ignore_index=IGNORED, reduction="sum")
        for row, label in zip(logits, labels, strict=True)
    ]
