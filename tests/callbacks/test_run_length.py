"""RunLength: steps follow from the rows where the Trainer has no end, schedules know it, and an end that is given stays."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from grit_lightning.callbacks import RunLength


class Data(pl.LightningDataModule):
    """So many batches of nothing."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.batches = batches

    def training_batches(self) -> int:
        return self.batches

    def train_dataloader(self) -> Any:
        return DataLoader(torch.zeros(self.batches, 1), batch_size=1)  # type: ignore[arg-type]


class Model(pl.LightningModule):
    """Learns nothing, and remembers how many steps its schedule was promised."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.promised: float = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        self.promised = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.0)


def run(batches: int, length: RunLength, **settings: Any) -> tuple[int, int, float]:
    """Epochs, optimizer steps, and the steps that the schedule was promised."""
    options: dict[str, Any] = {"max_epochs": -1, "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(**options | settings, callbacks=[length])
    model = Model()
    trainer.fit(model, datamodule=Data(batches))
    return trainer.current_epoch, trainer.global_step, model.promised


@pytest.mark.parametrize(
    ("batches", "settings", "expected"),
    [
        (4, {}, (3, 12, 12)),  # epochs
        (2, {}, (5, 10, 10)),  # more of them, to reach min_steps
        (1, {}, (6, 6, 6)),  # but no more than max_epochs
        (20, {}, (2, 30, 30)),  # max_steps ends it in the second epoch
        (8, {"accumulate_grad_batches": 3}, (4, 12, 12)),
        (4, {"limit_train_batches": 0.5}, (5, 10, 10)),
        (8, {"limit_train_batches": 2}, (5, 10, 10)),
    ],
)
def test_rows_say_how_long_a_run_is(batches: int, settings: dict[str, Any], expected: tuple[int, int, int]) -> None:
    length = RunLength(epochs=3, min_steps=10, max_epochs=6, max_steps=30)
    epochs, steps, promised = run(batches, length, **settings)
    assert (steps, promised) == expected[1:]
    assert epochs in (expected[0], expected[0] - 1)  # Lightning counts an epoch when it is whole


@pytest.mark.parametrize("settings", [{"max_steps": 5}, {"max_epochs": 1}])
def test_an_end_that_is_given_is_kept(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("grit_lightning.callbacks.run_length.rank_zero_info", said.append)
    _, steps, _ = run(8, RunLength(), **settings)
    assert steps == settings.get("max_steps", 8)
    assert "has an end of its own" in said[0]


def test_a_second_fit_of_a_trainer_takes_its_length_from_its_own_rows() -> None:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    length = RunLength(epochs=1, min_steps=1)
    trainer = pl.Trainer(max_epochs=-1, enable_model_summary=False, accelerator="cpu", callbacks=[length], **options)
    trainer.fit(Model(), datamodule=Data(4))
    assert (trainer.max_epochs, trainer.max_steps) == (1, 4)
    trainer.fit(Model(), datamodule=Data(7))
    assert (trainer.max_epochs, trainer.max_steps) == (1, 7)


def test_a_data_module_without_a_length_is_refused() -> None:
    class Endless(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(torch.zeros(4, 1))  # type: ignore[arg-type]

    trainer = pl.Trainer(max_epochs=-1, logger=False, enable_checkpointing=False, callbacks=[RunLength()])
    with pytest.raises(Exception, match=r"RunLength: expected a data module that knows .* got Endless. Set trainer"):
        trainer.fit(Model(), datamodule=Endless())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"epochs": 0}, "RunLength.epochs: expected an integer ≥ 1, got 0"),
        ({"min_steps": 0}, "RunLength.min_steps"),
        ({"epochs": 3, "max_epochs": 2}, "RunLength.max_epochs"),
        ({"min_steps": 10, "max_steps": 9}, "RunLength.max_steps"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        RunLength(**settings)


def test_no_end_of_steps_trains_all_epochs() -> None:
    assert RunLength(epochs=2, min_steps=1, max_steps=None).plan(5000) == (2, 10_000)
