"""Numbers of encoded rows against those counted by hand, and what is said of them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from grit_lightning.datamodules.pipeline.row_advice import epoch_advice, task_advice
from grit_lightning.datamodules.pipeline.row_numbers import (
    TokenRows,
    class_counts,
    contradicting_rows,
    histogram,
    lengths_in_numbers,
    overlap,
    padding_share,
    repeated_rows,
    split_in_numbers,
)

END = 9


def rows_of(*rows: tuple[list[int], list[int]], targets: list[int] | None = None) -> TokenRows:
    """Rows of one answer each: prompt and answer."""
    return TokenRows(
        [np.array(prompt + answer, dtype=np.int32) for prompt, answer in rows],
        [[len(prompt), len(prompt) + len(answer)] for prompt, answer in rows],
        [len(prompt) for prompt, _ in rows],
        targets or [-1] * len(rows),
    )


def task_of(
    training: TokenRows, cut: int = 0, left_out: int = 0, choices: Any = (), **held_out: TokenRows
) -> dict[str, Any]:
    """A report on splits, as `SeenTask.report` makes it."""
    splits = {
        name: split_in_numbers(rows, choices, [END], unknown=0) | {"cut": cut, "left_out": left_out, "problems": {}}
        for name, rows in {"train": training, **held_out}.items()
    }
    shared = {name: overlap(training, rows) for name, rows in held_out.items()}
    return {"source": "a.jsonl", "max_length": 8, "splits": splits, "overlap": shared}


def many(count: int = 20) -> list[tuple[list[int], list[int]]]:
    """Rows of which nothing is remarkable."""
    return [([100 + number, 5], [200 + number, END]) for number in range(count)]


def others(count: int = 10) -> list[tuple[list[int], list[int]]]:
    """As many others."""
    return [([300 + number, 5], [200 + number, END]) for number in range(count)]


def test_a_histogram_holds_every_row_once_in_bins_of_one_round_width() -> None:
    lengths = random.Random(0).choices(range(3, 701), k=500)

    bins = histogram(lengths)

    assert [bin_["rows"] for bin_ in bins] == [sum(bin_["from"] <= n <= bin_["to"] for n in lengths) for bin_ in bins]
    assert sum(bin_["rows"] for bin_ in bins) == 500
    widths = {bin_["to"] - bin_["from"] + 1 for bin_ in bins[:-1]}
    assert widths == {100}
    assert bins[-1]["to"] == max(lengths)


def test_one_row_out_of_measure_does_not_put_all_others_into_one_bar() -> None:
    bins = histogram([*range(1, 100), 100_000])

    assert len(bins) > 8
    assert bins[-1] == {"from": 150, "to": 100_000, "rows": 1}


@pytest.mark.parametrize("lengths", [[1], [7, 7, 7], [1, 2]])
def test_a_histogram_of_few_lengths_is_short(lengths: list[int]) -> None:
    bins = histogram(lengths)

    assert (bins[0]["from"], bins[-1]["to"]) == (min(lengths), max(lengths))


def test_at_least_95_of_100_rows_have_at_most_the_95th_percentile() -> None:
    lengths = list(range(1, 101))
    random.Random(0).shuffle(lengths)

    numbers = lengths_in_numbers(lengths)

    assert sum(length <= numbers["p95"] for length in lengths) in (95, 96)
    assert (numbers["shortest"], numbers["median"], numbers["mean"], numbers["longest"]) == (1, 50, 50.5, 100)


def test_padding_is_what_a_batch_holds_beyond_its_tokens() -> None:
    assert padding_share([[3, 1], [2]]) == pytest.approx(2 / 8)
    assert padding_share([[5, 5]]) == 0


def test_rows_that_stand_twice_and_prompts_answered_twice_are_counted() -> None:
    rows = rows_of(
        ([1, 1], [2]), ([1, 1], [2]), ([1, 1], [3]), ([1, 2], [3]), ([1], [4]), ([1], [5]), ([], [6]), ([], [7])
    )

    assert repeated_rows(rows) == 1  # the second [1, 1] → [2]
    assert contradicting_rows(rows) == 3  # [1, 1] → [2], [2] and [3]; one token may be the one that begins every row


def test_held_out_rows_that_are_training_rows_too_are_counted_apart_from_those_with_their_prompt_only() -> None:
    training = rows_of(([1, 1], [2]), ([1, 1], [3]), ([1, 4], [5]), ([], [8]))
    held_out = rows_of(([1, 1], [3]), ([1, 4], [6]), ([1, 7], [5]), ([], [9]))

    assert overlap(training, held_out) == {"same_rows": 1, "same_prompts": 1}


def test_every_answer_of_a_row_has_to_be_ended() -> None:
    tokens = np.array([1, 1, 2, END, 3, 4, 5], dtype=np.int32)
    ended, open_, without_prompt = [2, 4], [2, 4, 5, 7], [0, 3]

    rows = TokenRows([tokens] * 3, [ended, open_, without_prompt], [2, 5, 0], [-1] * 3)

    assert rows.unended([END]) == 1
    assert rows.learnt_lengths == [2, 4, 2]  # nothing stands before the first token, so that it cannot be learnt


def test_classes_are_counted_by_name_and_absent_ones_too() -> None:
    assert class_counts([2, 0, 2], ["a", "b", "c"]) == {"a": 1, "b": 0, "c": 2}


def test_of_ordinary_rows_nothing_is_said() -> None:
    assert task_advice(task_of(rows_of(*many()), validation=rows_of(*others()))) == []
    assert epoch_advice({"padding_share": 0.1}) == []


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (task_of(rows_of(*many()), cut=5), "5 of 20 training rows (25.0%) are cut to fit into max_length 8"),
        (task_of(rows_of(*many()), left_out=5), "5 of 25 training rows (20.0%) are left out"),
        (task_of(rows_of(*many(1))), "There is one training row."),
        (
            task_of(rows_of(*many()), validation=rows_of(*others(9))),
            "Rows in the validation split: 9. What is measured",
        ),
        (task_of(rows_of(*many(), ([1], [0, END]))), "1 of 83 tokens of the training rows are the one for what"),
        (
            task_of(rows_of(*many(), ([1] * 30, [END]))),
            "The longest training row has 31 tokens, where 95% have at most 4",
        ),
        (task_of(rows_of(*many(), ([1, 1], [2]))), "1 of 21 training rows hold an answer whose end is not learnt"),
        (task_of(rows_of(*many(), *many(5))), "5 of 25 training rows (20.0%) are copies of others"),
        (task_of(rows_of(*many(), ([100, 5], [7, END]))), "2 training rows share their prompt with a training row"),
        (
            task_of(rows_of(*many()), validation=rows_of(*many(2), *others(8))),
            "2 of 10 validation rows (20.0%) are training rows too",
        ),
        (
            task_of(rows_of(*many()), test=rows_of(([100, 5], [7, END]), *others())),
            "1 of 11 test rows have the prompt of a training row, which answers it differently",
        ),
        (
            task_of(rows_of(*many(), targets=[1] * 18 + [0] * 2), choices=["no", "yes"]),
            "18 of 20 training rows (90.0%) are 'yes': who always says so",
        ),
        (
            task_of(rows_of(*many(), targets=[0, 1] * 10), choices=["a", "b", "c", "d"]),
            "No training row is 'c' or 'd'.",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_is_remarkable_is_said_in_one_sentence(task: dict[str, Any], said: str) -> None:
    (sentence,) = task_advice(task)

    assert said in sentence


def test_much_padding_is_said() -> None:
    (sentence,) = epoch_advice({"padding_share": 0.51})

    assert sentence.startswith("51% of what the training batches hold is padding")


def test_closed_answers_and_text_without_prompts_need_no_end() -> None:
    closed = rows_of(*[([number, 1], [7]) for number in range(1, 21)], targets=[0, 1] * 10)
    text = rows_of(*[([], [number, 7]) for number in range(1, 21)])

    assert task_advice(task_of(closed, choices=["a", "b"])) == []
    assert task_advice(task_of(text)) == []
