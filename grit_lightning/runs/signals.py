"""Signals that ask a process to stop: noted when they come, acted upon when it suits the work."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Notes Ctrl-C, SIGTERM and the like, and leaves it to the program when to stop.

    A second Ctrl-C ends the process at once. Outside the main thread, where Python takes no handlers, nothing is noted.

    Args:
        extra: A further signal to note, None for no more than SIGINT and SIGTERM.

    Attributes:
        received: The first signal that came, None before.
    """

    def __init__(self, extra: signal.Signals | None = None) -> None:
        """Remember which signals to note; `install` begins."""
        self.received: signal.Signals | None = None
        self._noted = [signal.SIGINT, signal.SIGTERM, *([] if extra is None else [extra])]
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take the signals over from whoever handles them."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {each: signal.signal(each, self._note) for each in self._noted}

    def restore(self) -> None:
        """Give the signals back; does nothing when called again."""
        before, self._before = self._before, {}
        for each, handler in before.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = self.received or signal.Signals(number)


class StoppedBySignal(SystemExit):
    """Ends a process that a signal has stopped, with the exit code that shells expect: 128 plus the signal's number.

    Args:
        signum: The signal.
    """

    def __init__(self, signum: signal.Signals) -> None:
        """Derive the exit code."""
        super().__init__(128 + signum)
        self.signum = signum

    def __str__(self) -> str:
        """Return the signal's name."""
        return self.signum.name
