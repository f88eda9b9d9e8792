"""Where the time of a training step goes: named sections, timed on the device they run on.

On CUDA a section is bracketed by two events on the current stream and resolved later, so that measuring never makes the
host wait for the device. Without CUDA the host clock is exact, because every operation has ended when its call returns.

Sections nest, and each counts only its own time: the time of an inner section is taken from the one around it. The
sections of a stopwatch therefore never overlap, and their sum is the time that was measured.
"""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Any

import torch

_PENDING_BEFORE_RESOLVING = 2048  # spans; bounds the number of live CUDA events when nobody reads the stopwatch


def _cuda_is_up() -> bool:
    return torch.cuda.is_initialized()  # type: ignore[no-any-return]


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class _Span:
    """One passage through a section: its start and end, as host seconds or as CUDA events."""

    __slots__ = ("_stopwatch", "end", "name", "outer", "start")

    def __init__(self, stopwatch: Stopwatch, name: str) -> None:
        self._stopwatch = stopwatch
        self.name = name
        self.outer: str | None = None
        self.start: float | torch.cuda.Event | None = None
        self.end: float | torch.cuda.Event | None = None

    def __enter__(self) -> _Span:
        self._stopwatch._open(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopwatch._close(self)


class Stopwatch:
    """Adds up the seconds spent in named sections.

    Example:
        >>> stopwatch = Stopwatch("cpu")
        >>> with stopwatch("precondition"), stopwatch("inversion"):
        ...     pass
        >>> sorted(stopwatch.read()), stopwatch.calls["inversion"]
        (['inversion', 'precondition'], 1)
    """

    def __init__(self, device: torch.device | str | None = None, *, enabled: bool = True) -> None:
        """Start with nothing measured.

        Args:
            device: Where the timed work runs. None uses CUDA events as soon as this process has used CUDA, and the
                host clock until then.
            enabled: A disabled stopwatch measures nothing.
        """
        self.device = None if device is None else torch.device(device)
        self.enabled = enabled
        self.calls: dict[str, int] = {}
        """How often each section was left."""
        self._seconds: dict[str, float] = {}
        self._open_spans: list[_Span] = []
        self._pending: deque[_Span | dict[str, float]] = deque()
        self._spare_events: list[torch.cuda.Event] = []

    def __call__(self, name: str) -> _Span:
        """Return a context manager that adds the time spent in it to the section `name`."""
        return _Span(self, name)

    def read(self) -> dict[str, float]:
        """Return the seconds by section since the start; waits for the device to finish the sections already left."""
        self._resolve(wait=True)
        return dict(self._seconds)

    def snapshot(self) -> dict[str, float]:
        """Return the seconds by section up to now, without waiting for the device.

        The dict is filled once the sections before it are resolved: at the latest by the next `read`.
        """
        taken: dict[str, float] = {}
        self._pending.append(taken)
        self._resolve(wait=False)
        return taken

    def __getstate__(self) -> dict[str, Any]:
        """CUDA events cannot be copied or pickled: the copy keeps the sums and starts with nothing pending."""
        return {"device": self.device, "enabled": self.enabled, "calls": dict(self.calls), "seconds": self.read()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the sums of `__getstate__`."""
        self.__init__(state["device"], enabled=state["enabled"])  # type: ignore[misc]
        self.calls, self._seconds = state["calls"], state["seconds"]

    def _open(self, span: _Span) -> None:
        if self.enabled:
            span.outer = self._open_spans[-1].name if self._open_spans else None
            self._open_spans.append(span)
            span.start = self._now()

    def _close(self, span: _Span) -> None:
        if span.start is None:  # the stopwatch was disabled when the section was entered
            return
        span.end = self._now()
        self._open_spans.remove(span)
        self.calls[span.name] = self.calls.get(span.name, 0) + 1
        self._pending.append(span)
        if isinstance(span.end, float) or len(self._pending) >= _PENDING_BEFORE_RESOLVING:
            self._resolve(wait=False)

    def _now(self) -> float | torch.cuda.Event:
        kind = self.device.type if self.device else "cuda" if _cuda_is_up() else "cpu"
        if kind != "cuda":
            return time.perf_counter()
        event = self._spare_events.pop() if self._spare_events else _new_event()
        event.record()
        return event

    def _resolve(self, *, wait: bool) -> None:
        """Add up pending spans as they ended; without `wait`, up to the first that the device has not reached."""
        while self._pending:
            item = self._pending[0]
            if isinstance(item, dict):
                item.update(self._seconds)
            else:
                if isinstance(item.end, torch.cuda.Event):
                    if wait:
                        item.end.synchronize()
                    elif not item.end.query():
                        return
                elapsed = self._elapsed(item)
                self._seconds[item.name] = self._seconds.get(item.name, 0.0) + elapsed
                if item.outer is not None:
                    self._seconds[item.outer] = self._seconds.get(item.outer, 0.0) - elapsed
            self._pending.popleft()

    def _elapsed(self, span: _Span) -> float:
        if isinstance(span.start, torch.cuda.Event) and isinstance(span.end, torch.cuda.Event):
            elapsed: float = span.start.elapsed_time(span.end) / 1e3
            self._spare_events += (span.start, span.end)
            return elapsed
        if isinstance(span.start, float) and isinstance(span.end, float):
            return span.end - span.start
        return 0.0  # CUDA came up inside the section: the two clocks cannot be compared
