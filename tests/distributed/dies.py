"""A callback with which one process of a run comes to its end, as a machine or a bug would have it."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as pl


class DiesAt(pl.Callback):
    """Ends the process of a rank after an optimizer step: by SIGKILL, or by an error."""

    def __init__(self, rank: int, step: int, killed: bool) -> None:
        self.rank, self.step, self.killed = rank, step, killed

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(f"rank {self.rank} has had enough")


class SignalledAt(pl.Callback):
    """Sends a signal to the process of a rank in the middle of an optimizer step, counted from 1."""

    def __init__(self, rank: int, step: int, signum: int) -> None:
        self.rank, self.step, self.signum = rank, step, signum

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step - 1:
            os.kill(os.getpid(), self.signum)
