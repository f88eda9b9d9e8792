"""Training does not notice the probe, and a resumed run knows what was measured before it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from grit_lightning.callbacks import (
    AdapterCheckpoint,
    RankAdaptation,
    Reprojection,
    RunRecord,
)
from grit_lightning.callbacks.forgetting import FILENAME
from grit_lightning.optimizers import EigenbasisAdam
from grit_lightning.runs.folder import clear
from grit_lightning.runs.metrics_log import JSONLinesLogger

Factory = Callable[..., Any]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}/{index}")
    else:
        yield name, value.tolist() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("geometry", [True, False], ids=["geometry", "plain adapter"])
def test_a_run_with_the_probe_is_to_the_bit_the_run_without(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory, tmp_path: Path, geometry: bool
) -> None:
    def train(*callbacks: Callback) -> dict[str, Any]:
        steers = [
            Reprojection("balanced", every_n_steps=2),
            RankAdaptation(every_n_steps=3, threshold=0.9, min_rank=1, mixing_probability=0.5),
        ]
        module = quick_module(
            **({"optimizer": lambda p: EigenbasisAdam(p, lr=1e-2)} if geometry else {"geometry": None})
        )
        trainer = make_trainer(callbacks=[*callbacks, *(steers if geometry else [])], accumulate_grad_batches=2)
        pl.seed_everything(5, verbose=False)
        trainer.fit(module, loader(12))
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        saved: dict[str, Any] = torch.load(tmp_path / "end.ckpt", weights_only=True)
        saved["callbacks"].pop("ForgettingProbe", None)
        return saved

    without = dict(leaves(train()))
    with_probe = dict(leaves(train(probe(every_n_steps=1))))
    assert {name.split("/")[1] for name in without} >= {"state_dict", "optimizer_states", "grit"}
    assert [name for name in without.keys() | with_probe.keys() if without.get(name) != with_probe.get(name)] == []


class Stopped(Exception):  # noqa: N818
    """Ends a run where a signal might have."""


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Stopped


def test_a_resumed_run_knows_what_was_before_and_writes_the_same(
    quick_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    probe: Factory,
    tmp_path: Path,
    lines: Factory,
    summary: Factory,
) -> None:
    def run(name: str, *callbacks: Callback, resume: bool = False, **settings: Any) -> Path:
        folder = tmp_path / name
        same = DataLoader([next(iter(loader(1)))] * 8, batch_size=None)  # Lightning does not know where it was in these
        pl.seed_everything(5, verbose=False)
        own = [probe(every_n_steps=2, **settings), RunRecord(str(folder)), AdapterCheckpoint(folder / "checkpoints", 2)]
        make_trainer(
            callbacks=[*own, *callbacks],
            logger=JSONLinesLogger(folder),
            default_root_dir=folder,
            enable_checkpointing=True,
            max_steps=6,
            max_epochs=-1,
        ).fit(quick_module(), same, ckpt_path=folder / "checkpoints" / "last.ckpt" if resume else None)
        return folder

    whole = run("whole")
    with pytest.raises(Stopped):
        run("stopped", StopAt(5))
    resumed = run("stopped", resume=True)
    assert summary(resumed)["forgetting"] == summary(whole)["forgetting"]
    for name in ("forgetting.jsonl", "metrics.jsonl"):
        assert lines(resumed, name) == lines(whole, name)
    with pytest.raises(Stopped):
        run("changed", StopAt(3))
    with pytest.raises(
        ValueError, match="expected prose to hold what the checkpoint measured before training, got something else"
    ):
        run("changed", resume=True, block_size=16)


def test_a_run_that_replaces_another_replaces_its_measurements(tmp_path: Path) -> None:
    (tmp_path / FILENAME).touch()
    clear(tmp_path)
    assert not (tmp_path / FILENAME).exists()


def test_a_probe_that_comes_later_says_that_it_has_no_before(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory, tmp_path: Path
) -> None:
    trainer = make_trainer(max_steps=2, max_epochs=-1)
    trainer.fit(quick_module(), loader(4))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    later = probe()
    with pytest.warns(UserWarning, match="training goes on from step 2, and the checkpoint holds no measurement"):
        make_trainer(max_steps=3, max_epochs=-1, callbacks=[later]).fit(
            quick_module(), loader(4), ckpt_path=tmp_path / "end.ckpt"
        )
    row = later.report()["forgetting"]["prose"]["loss"]
    assert row["before"] is row["delta"] is None
    assert row["after"] != row["adapter_off_after"]
