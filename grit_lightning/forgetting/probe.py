"""What is measured, whatever it is: sequences to score, and what their scores mean."""

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
class Probe(ABC):
    """N units (blocks of text, questions) whose token sequences are scored before and after training.

    A metric is a sum of values over a sum of weights, both one a unit: nats over tokens, right answers over questions.

    Attributes:
        name: How results are called.
        sequences: What the model scores; a unit has one or several.
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
        """How much is measured, for the record."""
        return {f"{self.unit}s": len(self.weights)}

    @property
    def fingerprint(self) -> str:
        """Tells two sets of sequences apart."""
        return hashlib.sha256(repr(self.sequences).encode()).hexdigest()[:16]

    def within(self, context: int) -> Probe:
        """The same, with every sequence cut on the left to `context` tokens."""
        return replace(self, sequences=[sequence.last(context) for sequence in self.sequences])

    def describe(self, scores: Tensor) -> list[dict[str, Any]]:
        """One line a unit for the file in the run's folder: the value of each metric."""
        columns = {metric: values.tolist() for metric, values in self.values(scores).items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class TextProbe(Probe):
    """Blocks of text; the metric `loss` is L_pt, in nats per token."""

    unit = "block"

    @property
    def metrics(self) -> tuple[str, ...]:
        """One: the loss."""
        return ("loss",)

    @property
    def weights(self) -> Tensor:
        """Tokens of each block that are predicted."""
        return torch.tensor([sequence.scored for sequence in self.sequences], dtype=torch.float64)

    def values(self, scores: Tensor) -> dict[str, Tensor]:
        """Nats of each block, summed over its tokens."""
        return {"loss": -scores}

    @property
    def size(self) -> Mapping[str, int]:
        """Blocks, and the tokens in them that are predicted."""
        return {**super().size, "tokens": int(self.weights.sum())}

    def describe(self, scores: Tensor) -> list[dict[str, Any]]:
        """Nats and tokens of each block."""
        pairs = zip((-scores).tolist(), self.weights.tolist(), strict=True)
        return [{"nats": nats, "tokens": int(tokens)} for nats, tokens in pairs]
