"""StopOnSignal alone: what it saves where, when it ends at once, and that it leaves the signals as they were."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from grit_lightning.callbacks import AdapterCheckpoint, StopOnSignal
from grit_lightning.runs import atomic
from grit_lightning.runs.signals import StoppedBySignal

Factory = Callable[..., Any]


class Signals(pl.Callback):
    """Sends signals to this process in the middle of an optimizer step, counted from 1."""

    def __init__(self, step: int, *signums: int) -> None:
        self.step, self.signums = step, signums

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step - 1:
            for signum in self.signums:
                signal.raise_signal(signum)


@pytest.fixture(autouse=True)
def _the_signals_are_left_as_they_were() -> Iterator[None]:
    def handlers() -> list[Any]:
        return [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    before = handlers()
    yield
    assert handlers() == before


def stopped(trainer: pl.Trainer, module: Any, *loaders: Any) -> int:
    with pytest.raises(StoppedBySignal) as ended:
        trainer.fit(module, *loaders)
    return int(ended.value.code)  # type: ignore[arg-type]


def test_another_checkpoint_callback_gets_last_ckpt_in_its_folder(
    make_module: Factory, loader: Factory, make_trainer: Factory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = ModelCheckpoint(tmp_path / "mine", every_n_epochs=1)
    callbacks = [StopOnSignal(), own, Signals(3, signal.SIGTERM)]
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True)
    assert stopped(trainer, make_module(), loader(6), loader(1)) == 143
    assert torch.load(tmp_path / "mine" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert f"trainer.fit(…, ckpt_path='{tmp_path / 'mine' / 'last.ckpt'}')" in capfd.readouterr().err


def test_a_trainer_without_checkpoints_stops_and_says_that_nothing_is_saved(
    make_module: Factory, loader: Factory, make_trainer: Factory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(callbacks=[StopOnSignal(), Signals(3, signal.SIGINT)])
    assert stopped(trainer, make_module(), loader(6), loader(1)) == 130
    assert trainer.global_step == 3
    assert list(tmp_path.rglob("*.ckpt")) == []
    assert "No checkpoint was written: the Trainer has none (trainer.enable_checkpointing)" in capfd.readouterr().err


def test_a_second_ctrl_c_ends_in_the_middle_of_the_step(
    make_module: Factory, loader: Factory, make_trainer: Factory, tmp_path: Path
) -> None:
    callbacks = [AdapterCheckpoint(tmp_path, every_n_steps=1), StopOnSignal(), Signals(3, signal.SIGINT, signal.SIGINT)]
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True)
    assert stopped(trainer, make_module(), loader(6), loader(1)) == 130
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_second_ctrl_c_in_a_write_leaves_the_checkpoint_before_it_whole(
    make_module: Factory, loader: Factory, make_trainer: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(descriptor: int) -> None:
        if trainer.global_step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(atomic.os, "fsync", impatient)
    callbacks = [AdapterCheckpoint(tmp_path, every_n_steps=2), StopOnSignal(), Signals(3, signal.SIGINT)]
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True)
    assert stopped(trainer, make_module(), loader(6), loader(1)) == 130
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "epoch=0-step=2.ckpt"}


def test_a_full_disk_leaves_the_checkpoint_before_it_whole_and_is_said(
    make_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def full(descriptor: int) -> None:
        if trainer.global_step == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    callbacks = [AdapterCheckpoint(tmp_path, every_n_steps=2), StopOnSignal(), Signals(3, signal.SIGTERM)]
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True)
    assert stopped(trainer, make_module(), loader(6), loader(1)) == 143
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    assert "could not be saved ([Errno 28] No space left on device)" in capfd.readouterr().err


def test_repeated_sigterm_does_not_disturb_the_checkpoint(
    make_module: Factory, loader: Factory, make_trainer: Factory, tmp_path: Path
) -> None:
    callbacks = [AdapterCheckpoint(tmp_path), StopOnSignal(), Signals(3, signal.SIGTERM, signal.SIGTERM)]
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True)
    assert stopped(trainer, make_module(), loader(6), loader(1)) == 143
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_an_evaluation_ends_at_once(
    make_module: Factory, loader: Factory, make_trainer: Factory, capfd: pytest.CaptureFixture[str]
) -> None:
    class Impatient(pl.Callback):
        def on_test_batch_start(self, *args: Any) -> None:
            signal.raise_signal(signal.SIGTERM)

    trainer = make_trainer(callbacks=[Impatient(), StopOnSignal()])
    with pytest.raises(StoppedBySignal):
        trainer.test(make_module(), loader(2), verbose=False)
    assert "Stopped by SIGTERM in test. There was nothing to save." in capfd.readouterr().err


def test_a_handler_of_the_program_keeps_its_signal(
    make_module: Factory, loader: Factory, make_trainer: Factory
) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda signum, frame: heard.append(signum))
    try:
        trainer = make_trainer(callbacks=[StopOnSignal(), Signals(2, signal.SIGHUP)])
        trainer.fit(make_module(), loader(4), loader(1))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert heard == [signal.SIGHUP]
    assert trainer.global_step == 4


def test_a_run_outside_the_main_thread_trains_without_handlers(
    make_module: Factory, loader: Factory, make_trainer: Factory
) -> None:
    trainer = make_trainer(callbacks=[StopOnSignal()])
    module, batches = make_module(), (loader(3), loader(1))
    thread = threading.Thread(target=lambda: trainer.fit(module, *batches))
    thread.start()
    thread.join()
    assert trainer.global_step == 3
