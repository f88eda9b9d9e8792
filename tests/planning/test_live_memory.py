"""`LiveMemory`: bytes alive and their peak, against sums by hand and against what the allocator reports."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from grit_lightning.planning.live_memory import LiveMemory


def test_the_peak_is_remembered_when_memory_is_freed() -> None:
    with LiveMemory() as memory:
        first = torch.zeros(100)
        second = torch.zeros(50)
        del first
        third = torch.zeros(10)
    assert memory.peak == 4 * 150
    assert memory.live.total() == 4 * 60
    del second, third
    assert memory.live.total() == 0


def test_views_and_what_is_known_count_nothing() -> None:
    known = torch.zeros(1000)
    with LiveMemory([known]) as memory:
        view, other = known[:10], known.view(10, 100)
        own = torch.zeros(8)
        part = own[2:].view(3, 2)
    assert memory.live.total() == 4 * 8
    del view, other, part


def test_kinds_add_up_to_the_peak() -> None:
    with LiveMemory(kind_of=lambda tensor: "wide" if tensor.shape[-1] == 7 else "others") as memory:
        tensors = [torch.zeros(3, 7), torch.zeros(5)]
    assert memory.at_peak == {"wide": 84, "others": 20}
    del tensors


def allocated_at_peak(events: list[int]) -> int:
    total = peak = 0
    for change in events:
        total += change
        peak = max(peak, total)
    return peak


def test_a_backward_pass_takes_what_the_allocator_reports() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    rows = torch.randn(512, 64)
    model(rows).square().mean().backward()  # so that nothing is allocated for the first time below
    model.zero_grad()
    with LiveMemory([*model.parameters(), rows]) as memory:
        model(rows).square().mean().backward()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(rows).square().mean().backward()
    results = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in results if event.name() == "[memory]")
    reported = allocated_at_peak([size for _, size in changes])
    assert reported > 0
    assert abs(memory.peak - reported) <= 0.02 * reported  # kernels may allocate for themselves
