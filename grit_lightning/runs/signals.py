"""Signals that end a run: which they are, which exit code they lead to, and how they become an exception."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C; the wish of a scheduler or a shell; a terminal that has been closed."""


class StoppedBySignal(SystemExit):
    """Ends the process with the usual exit code: 128 and the signal's number, so 130 for Ctrl-C and 143 for SIGTERM.

    Attributes:
        signal: Which one it was.
        told: Whether the user has read about it.
    """

    def __init__(self, signum: int) -> None:
        """Take the exit code from the signal."""
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)
        self.told = False

    def __str__(self) -> str:
        """Return the name of the signal, for a summary."""
        return self.signal.name


def raise_at_once(signum: int, frame: FrameType | None = None) -> None:
    """Handle a signal where there is nothing to save."""
    raise StoppedBySignal(signum)


def handle(signums: Iterable[int], handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Set a handler, and return the handlers that were there before.

    Signals that are ignored stay so (`nohup` ignores SIGHUP). Outside the main thread, where Python allows no handler, nothing
    happens.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in signums:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                before[signum] = signal.signal(signum, handler)
    return before


def restore(before: Mapping[int, Any]) -> None:
    """Set the handlers that `handle` has returned."""
    if threading.current_thread() is threading.main_thread():
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let signals end what is in the block with one line instead of a traceback, and with their exit codes."""
    before = handle(ENDING, raise_at_once)
    try:
        yield
    except StoppedBySignal as stopped:
        if not stopped.told:
            tell(f"Stopped by {stopped.signal.name}.")
        raise
    finally:
        restore(before)


WORKERS_PATIENCE = 10
"""Seconds that a data-loader worker goes on for after SIGTERM: the step under way needs the batches that it has begun."""


def ignore_signals(worker: int = 0) -> None:
    """Leave it to the main process to end a data-loader worker; a `worker_init_fn`.

    A terminal and SLURM signal all processes. A worker that ended at once would leave the main process without its next batch.
    SIGTERM ends it a little later, because the main process, too, ends a worker by it that does not listen any more.
    """
    names = ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    for signum in (getattr(signal, name) for name in names if hasattr(signal, name)):
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKERS_PATIENCE))


def tell(text: str) -> None:
    """Write a line to the terminal from inside a signal handler, where `print` may find its own buffer in use."""
    try:
        os.write(2, f"\n{text}\n".encode())
    except OSError:  # the terminal has been closed
        return


def slurm_job() -> str | None:
    """Return the name of the SLURM job that this process belongs to; it keeps it when it is requeued."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def requeue_slurm_job() -> str:
    """Put the SLURM job of this process back into the queue, and return what came of it as a sentence."""
    job = str(slurm_job())
    try:
        ended = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"SLURM job {job} could not be requeued: {error}."
    if ended.returncode != 0:
        return f"SLURM job {job} could not be requeued: {ended.stderr.strip() or f'exit code {ended.returncode}'}."
    return f"SLURM job {job} has been requeued and will go on by itself."
