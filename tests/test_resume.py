"""A run that is stopped at any step and resumed is, to the bit, the run that never stopped."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.callbacks import AdapterCheckpoint, RankAdaptation, Reprojection, RunRecord, SpectraLogger
from grit_lightning.datamodules import BoolQDataModule
from grit_lightning.loggers import JSONLinesLogger
from grit_lightning.optimizers import EigenbasisAdam

STEPS = 12  # three epochs of 9 micro-batches would be 15: the last window of an epoch is a single micro-batch
OPTIMIZERS = {"adamw": torch.optim.AdamW, "eigenbasis": EigenbasisAdam}

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


class Stop(Exception):
    """Ends a run where a signal might have."""


class StopAfterCheckpoint(Checkpoint):
    """Raises when the checkpoint of a step has been written, before Lightning goes on. Checkpoints run last, in order."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._stop(trainer)

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        own = next(callback for callback in trainer.callbacks if isinstance(callback, AdapterCheckpoint))
        if trainer.global_step == own._saved_step == self.step:
            raise Stop


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 training and 4 validation questions: 9 micro-batches of 2."""
    folder = tmp_path_factory.mktemp("questions")
    for split, count in (("train", 18), ("validation", 4)):
        rows = [
            {"question": f"is {n} even", "passage": f"{n} " * (1 + n % 5), "answer": n % 2 == 0} for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def run(
    tmp_path: Path,
    questions: Path,
    make_tiny_llama: Callable[..., Any],
    lora_config: Callable[..., Any],
    tiny_tokenizer: Any,
) -> Callable[..., Path]:
    """Trains in a folder, from its start or from a checkpoint, and gives the folder."""

    def train(
        name: str,
        *callbacks: pl.Callback,
        resume: Path | None = None,
        optimizer: str = "adamw",
        workers: int = 0,
        backbone: Mapping[str, Any] | None = None,
        module: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        every_n_steps: int = 1,
        **trainer: Any,
    ) -> Path:
        folder = tmp_path / name
        noise = 7 if resume is None else 99  # a resumed process has drawn other random numbers before it is resumed
        pl.seed_everything(noise, verbose=False)
        own = [
            Reprojection("balanced", every_n_steps=4),
            RankAdaptation(every_n_steps=6, threshold=0.9, min_rank=1, energy_ema=0.5, mixing_probability=0.3),
            SpectraLogger(every_n_steps=3),
            RunRecord(str(folder), table="never"),
            AdapterCheckpoint(folder / "checkpoints", every_n_steps=every_n_steps),
        ]
        factory = OPTIMIZERS[optimizer]
        settings: dict[str, Any] = {
            "backbone": make_tiny_llama(**(backbone or {})),
            "adapter": lora_config(lora_dropout=0.2),
            "geometry": GeometryConfig(
                kfac_update_freq=2, kfac_min_samples=1, cov_averaging="ema", curvature_penalty=1e-3
            ),
            "optimizer": lambda parameters: factory(parameters, lr=1e-2),
        }
        torch.manual_seed(3)
        lightning_module = GritLitModule(**(settings | dict(module or {})))
        options: dict[str, Any] = {"batch_size": 2, "num_workers": workers, "max_length": 96, "val_limit": 4}
        datamodule = BoolQDataModule(tiny_tokenizer, str(questions), **(options | dict(data or {})))
        limits: dict[str, Any] = {
            "max_steps": STEPS,
            "limit_val_batches": 0,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
        }
        pl.Trainer(
            accelerator="cpu",
            devices=1,
            default_root_dir=folder,
            logger=JSONLinesLogger(folder),
            callbacks=[*own, *callbacks],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **(limits | trainer),
        ).fit(lightning_module, datamodule=datamodule, ckpt_path=resume)
        return folder

    return train


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def content(folder: Path) -> dict[str, Any]:
    """All of the last checkpoint but what must differ: the folder's own name, and seconds."""
    saved: dict[str, Any] = torch.load(last(folder), weights_only=True)
    del saved["grit_log"]["marks"]  # bytes; the seconds in the lines have no fixed length
    del saved["callbacks"]["RunRecord"], saved["callbacks"]["AdapterCheckpoint"]["kept"]  # one file more after a kill
    return saved


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from flat(item, f"{name}/{index}")
    else:
        yield name, value


def differing(one: Any, other: Any) -> list[str]:
    """Names of the leaves that are not equal to the bit; NaN equals itself."""
    first, second = dict(flat(one)), dict(flat(other))
    return sorted(first.keys() ^ second.keys()) + [
        name for name in first.keys() & second.keys() if not equal(first[name], second[name])
    ]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return same and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
    return bool(one == other) or (one != one and other != other)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in found]


def assert_same_run(one: Path, other: Path) -> None:
    assert differing(content(one), content(other)) == []
    for name in ("metrics.jsonl", "ranks.jsonl", "reprojections.jsonl"):
        assert lines(one, name) == lines(other, name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(run: Callable[..., Path], optimizer: str) -> None:
    whole = run("whole", optimizer=optimizer)
    ranks = content(whole)["grit"]["ranks"].values()
    assert min(ranks) < 4  # what is compared has been through both events
    assert [event["step"] for event in lines(whole, "reprojections.jsonl")] == [4, 8, 12]
    for step in range(1, STEPS):
        name = f"stopped at {step}"
        with pytest.raises(Stop):
            run(name, StopAfterCheckpoint(step), optimizer=optimizer)
        assert torch.load(last(whole.parent / name), weights_only=True)["global_step"] == step
        folder = run(name, resume=last(whole.parent / name), optimizer=optimizer)
        assert differing(content(whole), content(folder)) == [], name
        assert_same_run(whole, folder)
