"""Stopwatch: what counts to which section. The host clock is replaced, so that nothing here is timed."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from grit_lightning.geometry import stopwatch as timing
from grit_lightning.geometry.stopwatch import Stopwatch


@pytest.fixture
def advance(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Replaces the host clock by one that moves only when told to."""
    now = 0.0

    def move(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    return move


def test_sections_add_up_over_calls(advance: Callable[[float], None]) -> None:
    stopwatch = Stopwatch("cpu")
    for seconds in (1.0, 2.0):
        with stopwatch("capture"):
            advance(seconds)
        advance(10.0)  # outside every section
    assert stopwatch.read() == {"capture": 3.0}
    assert stopwatch.calls == {"capture": 2}


def test_inner_section_is_taken_from_the_outer_one(advance: Callable[[float], None]) -> None:
    stopwatch = Stopwatch("cpu")
    with stopwatch("backward"):
        advance(1.0)
        with stopwatch("capture"):
            advance(2.0)
            with stopwatch("reduce"):
                advance(4.0)
        advance(8.0)
    assert stopwatch.read() == {"backward": 9.0, "capture": 2.0, "reduce": 4.0}


def test_a_section_left_by_an_error_is_counted_and_closed(advance: Callable[[float], None]) -> None:
    stopwatch = Stopwatch("cpu")
    with contextlib.suppress(KeyError), stopwatch("capture"):
        advance(1.0)
        raise KeyError
    with stopwatch("precondition"):
        advance(2.0)
    assert stopwatch.read() == {"capture": 1.0, "precondition": 2.0}


def test_disabled_stopwatch_measures_nothing(advance: Callable[[float], None]) -> None:
    stopwatch = Stopwatch("cpu", enabled=False)
    with stopwatch("capture"):
        stopwatch.enabled = True  # entered while disabled: must not be closed as if it were open
        advance(1.0)
    assert stopwatch.read() == {}
    assert stopwatch.calls == {}


def test_snapshot_holds_what_was_measured_before_it(advance: Callable[[float], None]) -> None:
    stopwatch = Stopwatch("cpu")
    with stopwatch("capture"):
        advance(1.0)
    before = stopwatch.snapshot()
    with stopwatch("capture"):
        advance(2.0)
    assert before == {"capture": 1.0}
    assert stopwatch.read() == {"capture": 3.0}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_keep_the_sums_and_are_independent(
    advance: Callable[[float], None], duplicate: Callable[[Stopwatch], Stopwatch]
) -> None:
    stopwatch = Stopwatch("cpu")
    with stopwatch("capture"):
        advance(1.0)
    other = duplicate(stopwatch)
    with other("capture"):
        advance(1.0)
    assert other.read() == {"capture": 2.0}
    assert other.calls == {"capture": 2}
    assert stopwatch.read() == {"capture": 1.0}


class FakeEvent:
    """A CUDA event whose device reaches it only when told to."""

    clock = 0.0  # milliseconds on the device's timeline
    reached = False
    waits = 0
    made = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        type(self).made += 1

    def record(self) -> None:
        self.at = type(self).clock

    def query(self) -> bool:
        return type(self).reached

    def synchronize(self) -> None:
        type(self).waits += 1

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


@pytest.fixture
def cuda_events(monkeypatch: pytest.MonkeyPatch) -> type[FakeEvent]:
    event = type("Event", (FakeEvent,), {})
    monkeypatch.setattr(torch.cuda, "Event", event)
    return event


def test_cuda_sections_do_not_wait_until_read(cuda_events: type[FakeEvent]) -> None:
    stopwatch = Stopwatch("cuda")
    for _ in range(3):
        with stopwatch("capture"):
            cuda_events.clock += 500.0
    taken = stopwatch.snapshot()
    assert cuda_events.waits == 0
    assert taken == {}  # not resolved yet
    assert stopwatch.read() == {"capture": 1.5}
    assert cuda_events.waits == 3
    assert taken == {"capture": 1.5}


def test_cuda_events_are_bounded_and_used_again(cuda_events: type[FakeEvent], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_PENDING_BEFORE_RESOLVING", 8)
    cuda_events.reached = True
    stopwatch = Stopwatch("cuda")
    for _ in range(100):
        with stopwatch("capture"):
            cuda_events.clock += 10.0
    assert cuda_events.made == 16  # two for each of the eight spans that may be pending
    assert cuda_events.waits == 0
    assert stopwatch.read()["capture"] == pytest.approx(1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_section_counts_device_work_that_the_host_did_not_wait_for() -> None:
    stopwatch = Stopwatch()
    matrix = torch.randn(4096, 4096, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    with stopwatch("product"):
        for _ in range(20):
            matrix @ matrix
    end.record()
    end.synchronize()
    assert 0.0 < stopwatch.read()["product"] <= start.elapsed_time(end) / 1e3
