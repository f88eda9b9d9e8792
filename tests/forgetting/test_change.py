"""The change between two measurements, and its interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grit_lightning.forgetting.change import mean_change, mean_of_changes

N = 400
BOOTSTRAP_ERROR = 0.1  # relative; of an interval from 9,999 resamples of 400 units, against the normal one


def test_interval_is_that_of_the_mean_of_differences() -> None:
    difference = torch.randn(N, dtype=torch.float64) * 0.3 + 0.1
    before = torch.randn(N, dtype=torch.float64) * 50  # blocks differ far more than the training changes them
    change, interval = mean_change(before, before + difference, torch.ones(N))
    half = 1.959964 * float(difference.std()) / N**0.5
    assert interval is not None
    assert change == pytest.approx(float(difference.mean()), abs=1e-12)
    assert interval[0] == pytest.approx(change - half, abs=BOOTSTRAP_ERROR * half)
    assert interval[1] == pytest.approx(change + half, abs=BOOTSTRAP_ERROR * half)


def test_a_lower_level_gives_a_narrower_interval() -> None:
    difference = torch.randn(N)
    wide = mean_change(torch.zeros(N), difference, torch.ones(N), confidence=0.99)[1]
    narrow = mean_change(torch.zeros(N), difference, torch.ones(N), confidence=0.5)[1]
    assert wide is not None
    assert narrow is not None
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_units_count_by_their_weight() -> None:
    before, after = torch.tensor([10.0, 30.0]), torch.tensor([11.0, 36.0])  # nats of 5 and of 30 tokens
    change, interval = mean_change(before, after, torch.tensor([5.0, 30.0]))
    assert change == pytest.approx(7 / 35)
    assert interval == pytest.approx((1 / 5, 6 / 30))  # the same for both units, so for every resample


def test_a_single_unit_has_no_interval() -> None:
    assert mean_change(torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([4.0])) == (0.5, None)


def test_nothing_changed_is_a_change_of_zero() -> None:
    values = torch.rand(8)
    assert mean_change(values, values, torch.ones(8)) == (0.0, (0.0, 0.0))


def test_the_same_numbers_give_the_same_interval_and_leave_random_numbers_alone() -> None:
    before, after = torch.rand(16), torch.rand(16)
    state = np.random.get_state(legacy=False)["state"]
    first, second = (mean_change(before, after, torch.ones(16)) for _ in range(2))
    assert first == second
    now = np.random.get_state(legacy=False)["state"]
    assert now["pos"] == state["pos"]
    assert np.array_equal(now["key"], state["key"])


def test_a_mean_over_sets_resamples_within_each() -> None:
    """Sets that moved by other amounts, but each of them evenly, leave nothing to chance."""
    one, two = torch.zeros(7), torch.zeros(3)
    sets = [(one, one + 0.2, torch.ones(7)), (two, two, torch.ones(3))]
    change, interval = mean_of_changes(sets, [0.25, 0.75])
    assert change == pytest.approx(0.05)
    assert interval == pytest.approx((0.05, 0.05))
    assert mean_of_changes([sets[0]], [1.0]) == mean_change(one, one + 0.2, torch.ones(7))
    assert mean_of_changes([(one[:1], one[:1], torch.ones(1))], [1.0])[1] is None
