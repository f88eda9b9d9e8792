"""Ctrl-C, SIGTERM and SLURM's signals end the step under way, and the run can go on from there to the bit."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from grit_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint, validation_follows
from grit_lightning.checkpoints.atomic_io import make_atomic
from grit_lightning.checkpoints.random_state import random_state, restore_random_state
from grit_lightning.distributed.collectives import largest_of_processes
from grit_lightning.runs.signals import ENDING, StoppedBySignal, handle, raise_at_once, requeue_slurm_job, restore, tell
from grit_lightning.runs.writing import is_dev_run


class StopOnSignal(Callback):
    """Ends a run on SIGINT (Ctrl-C), SIGTERM or SIGHUP after the optimizer step under way, with a checkpoint of that step.

    It writes `last.ckpt`, says how to go on, and raises `StoppedBySignal`, a SystemExit with the usual exit code (130, 143,
    129). A second Ctrl-C ends at once; a checkpoint that is being written then is dropped, and the one before it stays whole.

    - *Several processes* end after the same step, whichever of them got the signal: one all-reduce of 8 bytes a step.
    - *In a validation* of the fit one process stops after the batch under way, and the resumed run validates anew. Several
      processes, and a run that averages weights (which a validation swaps), finish the validation first.
    - *Before the first step*, and in `validate`, `test` and `predict`, there is nothing to save: it ends at once.
    - *SLURM*: the signal on which Lightning requeues a job (SIGUSR1) does the same, and then requeues it.
    - `last.ckpt` is that of an `AdapterCheckpoint`; with another checkpoint callback it is written into that one's folder.
      A Trainer without any (`enable_checkpointing: false`) stops without a checkpoint, and says so.
    - A signal for which the program has a handler of its own is left to it, and a run outside the main thread does without.

    It moves itself to the end of the Trainer's callbacks, because what it saves must hold what they have done in the step.

    Args:
        resume_command: How to go on, with `{checkpoint}` for the path, to be printed. None is the call in Python.
    """

    def __init__(self, resume_command: str | None = None) -> None:
        """Remember the command."""
        self.resume_command = resume_command
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        self._taken: set[int] = set()
        self._requeue: set[int] = set()
        self._seen_step = 0
        self._training = False
        self._received: int | None = None
        self._owes_validation = False
        self._random_state: dict[str, Any] | None = None
        self._outcome = ""

    # Handlers.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew, as the last of the callbacks. Lightning takes its signals after this."""
        self._process, self._training, self._received, self._outcome = os.getpid(), False, None, ""
        self._before = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside the Trainer's __init__
        trainer.callbacks = [other for other in callbacks if other is not self] + [self]  # type: ignore[attr-defined]

    def _install(self) -> None:
        """Take the signals over from Lightning, whose own handlers save, and talk to other processes, in mid-step."""
        if not self._taken:
            now = {signum: signal.getsignal(signum) for signum in self._before}
            self._requeue = {signum for signum in now if _is_lightnings(now[signum])} - {signal.SIGTERM}
            free = {signum for signum in ENDING if _is_default(self._before[signum])}
            self._taken = set(handle(free | self._requeue, self._handle))

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """Note the signal for the end of the step, or end at once."""
        if os.getpid() != self._process:
            return  # a data-loader worker forked from this process, which the main process will end
        again = self._received is not None
        if not self._training or (again and signum == signal.SIGINT):
            raise StoppedBySignal(signum)
        if not again:
            self._received = signum
            name = signal.Signals(signum).name
            tell(f"{name}: stopping after the step under way, with a checkpoint. Ctrl-C again stops at once, without.")

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Be ready to end at once."""
        self._install()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Be ready to end at once."""
        self._install()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Be ready to end at once."""
        self._install()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._uninstall()

    def _uninstall(self) -> None:
        restore({signum: self._before[signum] for signum in self._taken})
        self._taken = set()
        self._training = False

    # The ends of steps.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is something to save."""
        self._install()
        self._training = True
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if this micro-batch has completed an optimizer step and any process has received a signal."""
        step = trainer.global_step
        if step == self._seen_step:
            return
        self._seen_step = step
        validates = validation_follows(trainer, batch_idx)
        self._random_state = random_state(pl_module.device) if validates else None
        signum = self._agreed(trainer)
        if signum is None:
            return
        if validates and step == trainer.max_steps:
            self._save(trainer)  # resumed, Lightning would find nothing left to do: this run validates, and then ends
        else:
            self._stop(trainer, signum, owes_validation=validates)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Be ready to end at once outside of a fit; in one that owes a validation since its checkpoint, correct the count."""
        self._install()
        if trainer.state.fn == TrainerFn.FITTING:
            progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.total.reset_on_restart()  # the batch that `_owe_validation` has only begun is none

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        """Stop in the middle of a validation, as if it had not begun."""
        if self._received is None or self._random_state is None or not self._may_cut_validation(trainer):
            return
        restore_random_state(self._random_state, pl_module.device)
        self._stop(trainer, self._received, owes_validation=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after a validation that had to be finished."""
        self._random_state = None
        if self._training and trainer.global_step != trainer.max_steps:
            signum = self._agreed(trainer)
            if signum is not None:
                self._stop(trainer, signum)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop a run whose last step is done: nothing that the program would do next shall begin."""
        signum = self._agreed(trainer)
        if signum is not None:
            self._stop(trainer, signum)
        self._training = False

    def _agreed(self, trainer: pl.Trainer) -> int | None:
        """Return the signal that any process has received; the same on all of them."""
        return largest_of_processes(self._received or 0, trainer.strategy.root_device) or None

    @staticmethod
    def _may_cut_validation(trainer: pl.Trainer) -> bool:
        averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        return trainer.world_size == 1 and trainer.global_step != trainer.max_steps and not averages

    # Stopping.

    def _stop(self, trainer: pl.Trainer, signum: int, owes_validation: bool = False) -> None:
        self._owes_validation = owes_validation
        try:
            self._outcome = self._save(trainer)
        except OSError as error:  # a full disk must not hide that the run was stopped, nor how
            self._outcome = f"This step could not be saved ({error}); an older checkpoint is as it was."
        self._owes_validation = False
        if signum in self._requeue and trainer.is_global_zero:
            self._outcome += f"\n{requeue_slurm_job()}"
        trainer.strategy.barrier("StopOnSignal")  # nobody leaves, and ends the job, before that is done
        raise StoppedBySignal(signum)

    def _save(self, trainer: pl.Trainer) -> str:
        """Write last.ckpt, and return what to tell the user."""
        if is_dev_run(trainer) or not trainer.checkpoint_callbacks:
            return "No checkpoint was written: the Trainer has none (trainer.enable_checkpointing)."
        own = next((each for each in trainer.checkpoint_callbacks if isinstance(each, AdapterCheckpoint)), None)
        if own is not None:
            own.save_unless_saved(trainer)
            path = Path(own.last_model_path)
        else:
            make_atomic(trainer)
            folder = getattr(trainer.checkpoint_callbacks[0], "dirpath", None) or trainer.default_root_dir
            path = Path(folder) / "last.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        command = f"trainer.fit(…, ckpt_path={str(path)!r})"
        if self.resume_command is not None:
            command = self.resume_command.format(checkpoint=shlex.quote(str(path)))
        processes = "" if trainer.world_size == 1 else f" (on {trainer.world_size} processes, started as before)"
        return f"It is saved in {path}. To go on{processes}:\n  {command}"

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Have the resumed run begin with the validation that this one does not finish."""
        if self._owes_validation:
            _owe_validation(checkpoint["loops"]["fit_loop"])

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say what came of the run, now that progress bars are closed, and give the signals back."""
        if isinstance(exception, StoppedBySignal):
            if trainer.is_global_zero:
                doing = "" if trainer.state.fn is None else f"in {trainer.state.fn.value}"
                where = f"after optimizer step {trainer.global_step}" if self._training else doing
                kept = "Nothing new was saved." if self._training else "There was nothing to save."
                tell(f"Stopped by {exception.signal.name} {where}. {self._outcome or kept}")
            exception.told = True
            if not trainer.is_global_zero and _started_by_lightning(trainer):
                exception.code = 0  # Lightning kills the first process as soon as another one fails
        self._uninstall()


def _is_default(handler: Any) -> bool:
    return handler in (signal.SIG_DFL, signal.default_int_handler, raise_at_once)


def _is_lightnings(handler: Any) -> bool:
    return type(handler).__module__.startswith("lightning.")


def _started_by_lightning(trainer: pl.Trainer) -> bool:
    return isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)


def _owe_validation(loops: dict[str, Any]) -> None:
    """Turn the loops' progress into that of a run in the first batch of a validation, from where Lightning validates."""
    trained = loops["epoch_loop.batch_progress"]
    for count in (trained["total"], trained["current"]):
        count["completed"] = count["processed"]
    validated = loops["epoch_loop.val_loop.batch_progress"]
    total, current = validated["total"], validated["current"]
    done = total["completed"]
    total.update(ready=done + 1, started=done + 1, processed=done, completed=done)
    current.update(ready=1, started=1, processed=0, completed=0)
    validated["is_last_batch"] = False
