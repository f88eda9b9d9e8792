"""Blocks of several texts are dealt out by weight and in turn, from any place on, and shared documents are found."""

from __future__ import annotations

from collections import Counter

import pytest

from grit_lightning.forgetting.dealt_blocks import WINDOW, DealtBlocks
from grit_lightning.forgetting.held_out import TextBlocks
from grit_lightning.forgetting.likelihood import TokenSequence


def text(name: str, first: int, blocks: int = 3, tokens: int = 40) -> TextBlocks:
    """Blocks of consecutive numbers."""
    starts = range(first, first + blocks * tokens, tokens)
    return TextBlocks(name, [TokenSequence(list(range(start, start + tokens))) for start in starts])


def names(general: DealtBlocks, blocks: int) -> str:
    """First letters of the texts that the next blocks are from."""
    owner = {sequence.ids[0]: one.name for one in general.texts for sequence in one.sequences}
    return "".join(owner[sequence.ids[0]] for sequence in general.deal(blocks))


def test_blocks_come_in_proportion_to_the_weights() -> None:
    general = DealtBlocks([text("a", 0), text("b", 1000), text("c", 2000)], {"b": 2.0, "c": 0.0})
    assert Counter(names(general, 30)) == {"a": 10, "b": 20}


def test_each_text_gives_its_blocks_in_order_again_and_again() -> None:
    general = DealtBlocks([text("a", 0)])
    assert [sequence.ids[0] for sequence in general.deal(5)] == [0, 40, 80, 0, 40]


@pytest.mark.parametrize("place", [0, 1, 7])
def test_the_order_goes_on_from_any_place(place: int) -> None:
    texts, weights = [text("a", 0), text("b", 1000, blocks=2)], {"a": 3.0}
    whole = DealtBlocks(texts, weights).deal(12)
    again = DealtBlocks(texts, weights)
    again.deal(5)
    again.go_to(place)
    assert (again.deal(12 - place), again.dealt) == (whole[place:], 12)


def test_the_fingerprint_is_of_content_and_weights() -> None:
    one = DealtBlocks([text("a", 0), text("b", 1000)], {"a": 2.0})
    assert one.fingerprint == DealtBlocks([text("a", 0), text("b", 1000)], {"a": 2.0, "b": 1.0}).fingerprint
    for other in (DealtBlocks(one.texts), DealtBlocks([text("a", 1), text("b", 1000)], {"a": 2.0})):
        assert other.fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (text("same", 0), 3),
        (text("later", 40, blocks=1), 1),
        (text("cut elsewhere", 5, blocks=2, tokens=2 * WINDOW), 2),  # the same document in blocks of another size
        (text("another", 5000), 0),
        (text("short", 3, blocks=1, tokens=4), 1),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_shared_documents_are_found_by_content(other: TextBlocks, shared: int) -> None:
    assert DealtBlocks([text("a", 0)]).shared_with(other) == shared


def test_fewer_tokens_than_needed_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match=r"Retention\.texts: expected at least 121 tokens .*, got 120\. Use more text"):
        DealtBlocks([text("a", 0)]).require_tokens(121, "Retention.texts")
    DealtBlocks([text("a", 0)]).require_tokens(120, "Retention.texts")


def test_tokens_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Retention\.tokenizer: expected that of the backbone, .* below 119, got .* 119"
    ):
        DealtBlocks([text("a", 0)]).require_known(119, "Retention.tokenizer")
    DealtBlocks([text("a", 0)]).require_known(120, "Retention.tokenizer")
