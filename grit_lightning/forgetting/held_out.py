"""A held-out data set of any kind: token sequences to score, and what their scores mean."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from grit_lightning.forgetting.likelihood import TokenSequence


@dataclass(frozen=True)
class HeldOutSet(ABC):
    """N units (blocks of text, questions) whose token sequences are scored before and after training.

    A metric is a sum of values over a sum of weights, one of each per unit: nats over tokens, right answers over questions.

    Attributes:
        name: What its results are called.
        sequences: What the model scores; one or several per unit.
    """

    unit: ClassVar[str]
    name: str
    sequences: list[TokenSequence]

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""

    @property
    @abstractmethod
    def weights(self) -> Tensor:
        """Weight of each unit, float64 `[N]`."""

    @abstractmethod
    def values(self, scores: Tensor) -> dict[str, Tensor]:
        """Turn log-likelihoods of the sequences, float64, into the values of each metric, float64 `[N]`."""

    @property
    def size(self) -> Mapping[str, int]:
        """The amount that is measured, for summary.json."""
        return {f"{self.unit}s": len(self.weights)}

    @property
    def fingerprint(self) -> str:
        """A hash that tells two sets of sequences apart."""
        return hashlib.sha256(repr(self.sequences).encode()).hexdigest()[:16]

    def within(self, context: int) -> HeldOutSet:
        """Return the same set with every sequence cut on the left to `context` tokens."""
        return replace(self, sequences=[sequence.last(context) for sequence in self.sequences])

    def describe(self, scores: Tensor) -> list[dict[str, Any]]:
        """Return a line per unit for the file in the run's folder: the value of each metric."""
        columns = {metric: values.tolist() for metric, values in self.values(scores).items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class TextBlocks(HeldOutSet):
    """Blocks of text; the metric `loss` is L_pt, in nats per token."""

    unit = "block"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The loss alone."""
        return ("loss",)

    @property
    def weights(self) -> Tensor:
        """Tokens of each block that are predicted."""
        return torch.tensor([sequence.scored for sequence in self.sequences], dtype=torch.float64)

    def values(self, scores: Tensor) -> dict[str, Tensor]:
        """Return the nats of each block, summed over its tokens."""
        return {"loss": -scores}

    @property
    def size(self) -> Mapping[str, int]:
        """The number of blocks, and of the tokens in them that are predicted."""
        return {**super().size, "tokens": int(self.weights.sum())}

    def describe(self, scores: Tensor) -> list[dict[str, Any]]:
        """Return the nats and tokens of each block."""
        pairs = zip((-scores).tolist(), self.weights.tolist(), strict=True)
        return [{"nats": nats, "tokens": int(tokens)} for nats, tokens in pairs]
