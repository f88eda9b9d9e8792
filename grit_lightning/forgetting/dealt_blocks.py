"""General text to take statistics of: blocks of several sources, dealt out in turn and by weight, without random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from grit_lightning.errors import InvalidValueError
from grit_lightning.forgetting.held_out import TextBlocks
from grit_lightning.forgetting.likelihood import TokenSequence

WINDOW = 24
"""Tokens in a row that two texts must share to be taken for the same."""


@dataclass
class DealtBlocks:
    """Blocks of one or several texts in an endless order that depends on nothing but their number and weights.

    Attributes:
        texts: The blocks of each text.
        weights: Share of each text among the blocks, by name; texts that are not named have 1.
        dealt: Blocks dealt out so far.
    """

    texts: Sequence[TextBlocks]
    weights: Mapping[str, float] = field(default_factory=dict)
    dealt: int = 0
    _known: dict[int, set[tuple[int, ...]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Begin with the first block."""
        self.go_to(self.dealt)

    def go_to(self, dealt: int) -> None:
        """Deal as if `dealt` blocks had been dealt out."""
        self._owed, self._next, self.dealt = [0.0] * len(self.texts), [0] * len(self.texts), 0
        self.deal(dealt)

    def deal(self, blocks: int) -> list[TokenSequence]:
        """Return the next blocks: each time of the text that is furthest behind its share, in the order of its blocks."""
        shares = [self.weights.get(text.name, 1.0) for text in self.texts]
        found = []
        for _ in range(blocks):
            self._owed = [owed + share / sum(shares) for owed, share in zip(self._owed, shares, strict=True)]
            chosen = max(range(len(shares)), key=self._owed.__getitem__)
            self._owed[chosen] -= 1.0
            sequences = self.texts[chosen].sequences
            found.append(sequences[self._next[chosen] % len(sequences)])
            self._next[chosen] += 1
        self.dealt += blocks
        return found

    @property
    def blocks(self) -> int:
        """Blocks of all texts."""
        return sum(len(text.sequences) for text in self.texts)

    @property
    def tokens(self) -> int:
        """Tokens of all blocks."""
        return sum(len(sequence.ids) for text in self.texts for sequence in text.sequences)

    @property
    def fingerprint(self) -> str:
        """A hash that tells two such orders apart."""
        parts = [(text.fingerprint, self.weights.get(text.name, 1.0)) for text in self.texts]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def require_tokens(self, needed: int, settings: str) -> None:
        """Check that there is enough to take statistics of.

        Args:
            needed: Tokens that it takes.
            settings: What to change if there are fewer.

        Raises:
            ValueError: If there are fewer.
        """
        if self.tokens < needed:
            raise InvalidValueError(
                f"{settings}: expected at least {needed} tokens of general text for an adapter of this rank, got "
                f"{self.tokens}. Use more text, or raise max_blocks or block_size."
            )

    def require_known(self, vocabulary: int, settings: str) -> None:
        """Check that the tokens are a model's.

        Args:
            vocabulary: Number of tokens that the model knows.
            settings: What to change if it does not know one.

        Raises:
            ValueError: If it does not.
        """
        largest = max(max(sequence.ids) for text in self.texts for sequence in text.sequences)
        if largest >= vocabulary:
            raise InvalidValueError(
                f"{settings}: expected that of the backbone, whose token ids are below {vocabulary}, got one with {largest}. "
                "Leave it out, or name the backbone's."
            )

    def shared_with(self, other: TextBlocks) -> int:
        """Count the blocks of another text that have `WINDOW` tokens in a row (or all of theirs) in common with this one."""
        return sum(self._contains(sequence.ids) for sequence in other.sequences)

    def _contains(self, ids: Sequence[int]) -> bool:
        size = min(WINDOW, len(ids))
        return not self._windows(size).isdisjoint(_runs(ids, size))

    def _windows(self, size: int) -> set[tuple[int, ...]]:
        """Return all runs of `size` tokens."""
        known = self._known
        if size not in known:
            all_ids = (sequence.ids for text in self.texts for sequence in text.sequences)
            known[size] = {run for ids in all_ids for run in _runs(ids, size)}
        return known[size]


def _runs(ids: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    return (tuple(ids[start : start + size]) for start in range(len(ids) - size + 1))
