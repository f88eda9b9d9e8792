"""JSONLinesLogger: every line is JSON that a strict parser takes, and a resumed run holds each step once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities import rank_zero_only

from grit_lightning.runs.metrics_log import JSONLinesLogger


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_one_object_a_line_with_step_epoch_and_time_first(tmp_path: Path) -> None:
    logger = JSONLinesLogger(tmp_path / "run")
    logger.log_metrics({"train/loss": 0.5, "epoch": 2}, step=7)
    logger.log_metrics({"val/accuracy": torch.tensor(0.25), "rows": 3}, step=8)
    logger.log_metrics({"note": 1})
    lines = read(tmp_path / "run" / "metrics.jsonl")
    assert list(lines[0])[:3] == ["step", "epoch", "time"]
    assert [{k: v for k, v in line.items() if k != "time"} for line in lines] == [
        {"step": 7, "epoch": 2, "train/loss": 0.5},
        {"step": 8, "epoch": None, "val/accuracy": 0.25, "rows": 3},
        {"step": None, "epoch": None, "note": 1},
    ]


def test_non_finite_numbers_are_valid_json_and_read_back(tmp_path: Path) -> None:
    logger = JSONLinesLogger(tmp_path)
    logger.log_metrics({"a": math.nan, "b": math.inf, "c": torch.tensor(-math.inf), "d": None}, step=0)
    (line,) = read(logger.path)
    assert math.isnan(float(line["a"]))
    assert float(line["b"]) == math.inf
    assert float(line["c"]) == -math.inf
    assert line["d"] is None


def test_metric_that_is_no_number_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    logger = JSONLinesLogger(tmp_path)
    with pytest.raises(TypeError, match=r"shape \(2,\)"):
        logger.log_metrics({"fine": 1.0, "spectrum": torch.ones(2)}, step=0)
    with pytest.raises(TypeError, match="got object"):
        logger.log_metrics({"wrong": object()}, step=0)
    assert not logger.path.exists()


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = JSONLinesLogger(tmp_path)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger.log_metrics({"loss": 1.0}, step=0)
    assert not logger.path.exists()


def test_truncation_keeps_each_step_once_and_drops_a_torn_line(tmp_path: Path) -> None:
    logger = JSONLinesLogger(tmp_path)
    logger.truncate_after(3)  # no file yet
    assert not logger.path.exists()
    logger.log_metrics({"hint": 1})
    for step in range(6):
        logger.log_metrics({"loss": 1.0}, step=step)
    with logger.path.open("a") as file:
        file.write('{"step": 6, "lo')
    logger.truncate_after(3)
    assert [line["step"] for line in read(logger.path)] == [None, 0, 1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncation_refuses_a_file_that_is_not_ours(tmp_path: Path) -> None:
    logger = JSONLinesLogger(tmp_path)
    logger.path.write_text('step,loss\n{"step": 0}\n')
    with pytest.raises(ValueError, match="line 1: expected a JSON object with a step, got"):
        logger.truncate_after(0)
    assert logger.path.read_text().startswith("step,loss")


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # Lightning's own
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_trainer_puts_metrics_and_checkpoints_directly_in_the_folder(tmp_path: Path) -> None:
    class Logged(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            self.log("train/loss", output["loss"], batch_size=1)
            return output

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.randn(4, 32))

    trainer = pl.Trainer(
        logger=JSONLinesLogger(tmp_path / "run"),
        callbacks=[ModelCheckpoint(every_n_train_steps=4)],
        max_steps=4,
        limit_val_batches=0,
        log_every_n_steps=2,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Logged())
    assert trainer.log_dir == str(tmp_path / "run")
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {"metrics.jsonl", "checkpoints"}
    lines = read(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 3]
    assert all(isinstance(line["train/loss"], float) and line["epoch"] == 0 for line in lines)
