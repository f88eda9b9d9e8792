"""A run that is stopped at any step and resumed is, to the bit, the run that never stopped.

- with either optimizer, after any step, several times, across validation, epochs and workers;
- inside an accumulation window, whose gradients the checkpoint holds;
- its parts alone: random numbers, and the next batch of a loader.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, TensorDataset

from grit_lightning import GritLitModule
from grit_lightning.checkpoints.random_state import random_state, restore_random_state
from grit_lightning.datamodules.pipeline.resumable import ResumableLoader, ResumableSampler


@pytest.mark.parametrize("optimizer", ["adamw", "eigenbasis"])
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(run: Any, whole: Path, optimizer: str) -> None:
    if optimizer != "adamw":
        whole = run("whole", optimizer=optimizer)
    assert min(run.content(whole)["grit"]["ranks"].values()) < 4  # what is compared has been through both events
    assert {event["step"] for event in run.lines(whole, "ranks.jsonl")} == {6, 12}
    assert [event["step"] for event in run.lines(whole, "reprojections.jsonl")] == [4, 8, 12]
    # one run with all the stops, as a bit that one of them changes stays changed; 5 and 10 end an epoch
    run.assert_same(whole, run.stop_and_resume("stopped", 1, 3, 4, 5, 6, 10, optimizer=optimizer))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": -1, "max_epochs": 3},  # the length of the schedule then depends on the data
        {"max_steps": -1, "max_epochs": 3, "limit_val_batches": 1.0, "workers": 1},
        {"limit_val_batches": 1.0, "val_check_interval": 4},
        {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None},
        {"limit_train_batches": 7, "log_every_n_steps": 3},
    ],
    ids=["epochs", "epochs, validation, workers", "validation in an epoch", "validation across epochs", "limit"],
)
def test_a_run_stopped_several_times_goes_on_bit_for_bit(run: Any, settings: dict[str, Any]) -> None:
    whole = run("whole", **settings)
    run.assert_same(whole, run.stop_and_resume("stopped", 2, 4, 5, 7, **settings))


def test_a_checkpoint_inside_an_accumulation_window_holds_its_gradients(run: Any, whole: Path) -> None:
    class SaveInsideWindow(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 2:  # the first of the second window's two micro-batches
                trainer.save_checkpoint(run.folder / "inside.ckpt")
                raise run.stopped

    with pytest.raises(run.stopped):
        run("stopped", SaveInsideWindow())
    run.assert_same(whole, run("stopped", resume=run.folder / "inside.ckpt"))


def test_random_numbers_go_on_where_they_were() -> None:
    def draw() -> tuple[Any, ...]:
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            np.random.randn(),
            random.random(),
            random.gauss(0, 1),
        )

    draw()
    state = random_state(torch.device("cpu"))
    expected = draw()
    draw()
    restore_random_state(state, torch.device("cpu"))
    assert draw() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_with_the_next_batch(workers: int) -> None:
    def loader() -> ResumableLoader:
        rows = TensorDataset(torch.arange(23))
        sampler = ResumableSampler(rows, num_replicas=1, rank=0, shuffle=True, seed=5)
        return ResumableLoader(rows, 4, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)

    def batches(source: ResumableLoader, epoch: int) -> list[list[int]]:
        iterator = iter(source)  # before the epoch is told, as Lightning does it
        source.sampler.set_epoch(epoch)
        found = [batch[0].tolist() for batch in iterator]
        CombinedLoader(source).reset()  # ends the workers as the Trainer does; left to the garbage, they take seconds
        return found

    whole = loader()
    expected = [batches(whole, epoch) for epoch in range(2)]
    assert expected[0] != expected[1]
    begun = loader()
    begun.sampler.set_epoch(1)
    iterator = iter(begun)
    for _ in range(2):
        next(iterator)
    CombinedLoader(begun).reset()
    resumed = loader()
    resumed.load_state_dict(begun.state_dict())
    assert resumed.state_dict() == begun.state_dict()
    assert len(resumed) == len(begun) == 6
    assert batches(resumed, 1) == expected[1][2:]
    finished = loader()
    finished.load_state_dict(whole.state_dict())  # of a finished epoch: the next one begins at its start
    assert len(batches(finished, 2)) == 6


def test_a_checkpoint_keeps_its_precision_on_the_way_back(
    make_tiny_llama: Any, lora_config: Any, random_batch: Any, tmp_path: Path
) -> None:
    """Lightning loads it before it makes the model float64."""

    def fit(ckpt_path: Path | None = None, epochs: int = 2) -> GritLitModule:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            accelerator="cpu", precision="64-true", max_epochs=epochs, default_root_dir=tmp_path, **quiet
        )
        torch.manual_seed(0)
        module = GritLitModule(make_tiny_llama(num_hidden_layers=1), lora_config(), lr_scheduler=None)
        batches = DataLoader([random_batch(length=8)] * 2, batch_size=None)
        trainer.fit(module, batches, batches, ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = fit()
    fit(epochs=1)
    resumed = fit(tmp_path / "1.ckpt")
    for name, value in whole.state_dict().items():
        assert value.dtype == torch.float64
        assert torch.equal(value, resumed.state_dict()[name])
