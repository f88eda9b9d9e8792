"""RunRecord: what stands in summary.json and in the table, in every way that a run can go."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from grit_lightning.callbacks import GeometryProgressBar, RunRecord, StepTimer
from grit_lightning.callbacks.rank_adaptation import RankAdaptation
from grit_lightning.callbacks.reprojection import Reprojection
from grit_lightning.callbacks.spectra import SpectraLogger
from grit_lightning.runs import provenance
from grit_lightning.runs.metrics_log import JSONLinesLogger

Factory = Callable[..., Any]

KEYS = {
    "status",
    "error",
    "metrics",
    "majority_class",
    "trainable_parameters",
    "effective_parameters",
    "ranks",
    "mean_rank",
    "mean_rank_by_type",
    "reprojection_count",
    "counters",
    "steps_timed",
    "step_time_seconds",
    "geometry_share",
    "time_split_seconds",
    "peak_memory_bytes",
    "peak_rss_bytes",
    "wall_seconds",
    "global_step",
    "epoch",
    "seed",
    "device",
    "world_size",
    "versions",
    "git_commit",
    "git_dirty",
}


def summary_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_documented_keys_are_the_written_ones(
    make_module: Factory, loader: Factory, make_trainer: Factory, tmp_path: Path
) -> None:
    make_trainer(callbacks=[RunRecord()]).fit(make_module(), loader(2), loader(1))
    assert set(summary_in(tmp_path)) == KEYS
    assert all(f"`{key}`" in str(RunRecord.__doc__) for key in KEYS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]  # nothing half-written stays behind


def test_adapter_numbers_are_those_of_the_model(
    make_module: Factory, loader: Factory, make_trainer: Factory, tmp_path: Path
) -> None:
    module = make_module()
    reprojection = Reprojection(every_n_steps=2, k=3)
    make_trainer(callbacks=[reprojection, RunRecord()]).fit(module, loader(6), loader(1))
    summary = summary_in(tmp_path)
    # q_proj is 32 → 32 and v_proj 32 → 16 (two key/value heads of four), in each of two layers.
    assert summary["trainable_parameters"] == 2 * 4 * ((32 + 32) + (32 + 16))
    assert summary["effective_parameters"] == 2 * 3 * ((32 + 32) + (32 + 16))
    assert len(summary["ranks"]) == 4
    assert set(summary["ranks"].values()) == {3}
    assert summary["mean_rank_by_type"] == {"q_proj": 3.0, "v_proj": 3.0}
    assert summary["mean_rank"] == 3.0
    assert summary["reprojection_count"] == module.geometry.reprojection_count > 0
    assert summary["global_step"] == 6
    assert summary["status"] == "finished"


def test_plain_lora_reports_its_allocated_ranks(
    make_module: Factory, loader: Factory, make_trainer: Factory, tmp_path: Path
) -> None:
    make_trainer(callbacks=[RunRecord(), StepTimer(every_n_steps=None)]).fit(make_module(None), loader(8), loader(1))
    summary = summary_in(tmp_path)
    assert summary["trainable_parameters"] == summary["effective_parameters"] == 2 * 4 * ((32 + 32) + (32 + 16))
    assert set(summary["ranks"].values()) == {4}
    assert summary["geometry_share"] == 0.0
    assert summary["steps_timed"] == 8 - 5  # the timer leaves five steps out


def test_times_are_null_without_a_timer(
    make_module: Factory, loader: Factory, make_trainer: Factory, tmp_path: Path
) -> None:
    record = RunRecord()
    trainer = make_trainer(callbacks=[record])
    trainer.fit(make_module(), loader(8), loader(1))
    assert trainer.callbacks == [record]  # a callback adds no other
    summary = summary_in(tmp_path)
    assert summary["step_time_seconds"] == {"mean": None, "p95": None, "p99": None}
    assert (summary["steps_timed"], summary["geometry_share"], summary["time_split_seconds"]) == (0, None, {})


def test_metrics_before_and_after(
    make_module: Factory, loader: Factory, make_trainer: Factory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [RunRecord(table="evaluation_end"), StepTimer(every_n_steps=None)]
    module, trainer = make_module(), make_trainer(callbacks=callbacks, max_epochs=3)
    (before,) = trainer.validate(module, loader(2), verbose=False)
    assert summary_in(tmp_path)["status"] == "evaluated"
    trainer.fit(module, loader(8), loader(2))
    (within,) = trainer.validate(module, loader(2), verbose=False)
    (tested,) = trainer.test(module, loader(1), verbose=False)
    summary = summary_in(tmp_path)
    assert summary["status"] == "finished"
    assert summary["metrics"]["before"] == before
    assert summary["metrics"]["after"] == within | tested
    assert within["val/loss"] < before["val/loss"]
    assert list(summary["metrics"]["train"]) == ["train/loss"]
    assert summary["steps_timed"] == 24 - 5
    shown = capsys.readouterr().out
    assert f"{before['val/loss']:.4f}" in shown
    assert f"{within['val/loss']:.4f}" in shown


def test_validation_within_the_fit_is_the_metric_after(
    make_module: Factory, loader: Factory, make_trainer: Factory, tmp_path: Path
) -> None:
    class NotYet(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert not (tmp_path / "summary.json").exists()  # validated, but the run has not ended

    trainer = make_trainer(callbacks=[RunRecord(), NotYet()], num_sanity_val_steps=1)
    trainer.fit(make_module(), loader(2), loader(2))
    summary = summary_in(tmp_path)
    assert summary["metrics"]["before"] == {}  # the sanity check measures nothing
    assert list(summary["metrics"]["after"]) == ["val/loss"]


def test_evaluating_later_adds_metrics_and_keeps_the_rest(
    make_module: Factory, loader: Factory, make_trainer: Factory, tmp_path: Path
) -> None:
    trainer = make_trainer(callbacks=[RunRecord()])
    trainer.fit(make_module(), loader(8), loader(1))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    trained = summary_in(tmp_path)
    (tested,) = make_trainer(callbacks=[RunRecord()]).test(
        make_module(), loader(1), ckpt_path=tmp_path / "end.ckpt", verbose=False
    )
    expected = trained | {"metrics": trained["metrics"] | {"after": trained["metrics"]["after"] | tested}}
    assert summary_in(tmp_path) == expected


@pytest.mark.parametrize(
    ("raised", "status"), [(RuntimeError("on purpose"), "failed"), (KeyboardInterrupt(), "interrupted")], ids=str
)
def test_run_that_does_not_end_says_so(
    make_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    status: str,
) -> None:
    class Stops(Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.global_step == 3:
                raise raised

    with pytest.raises((RuntimeError, SystemExit)):  # Lightning turns Ctrl+C into SystemExit
        make_trainer(callbacks=[RunRecord(), Stops()]).fit(make_module(), loader(8), loader(1))
    summary = summary_in(tmp_path)
    assert summary["status"] == status
    assert summary["error"] == f"{type(raised).__name__}: {raised}"
    assert summary["global_step"] == 3
    assert capsys.readouterr().out == ""


def test_non_finite_metric_is_valid_json(
    make_module: Factory, loader: Factory, make_trainer: Factory, tmp_path: Path
) -> None:
    class Diverges(Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.log("val/perplexity", torch.tensor(math.inf))

    make_trainer(callbacks=[RunRecord(), Diverges()]).fit(make_module(), loader(1), loader(1))
    assert summary_in(tmp_path)["metrics"]["after"]["val/perplexity"] == "Infinity"


def test_resumed_run_holds_every_step_once_and_remembers_the_metric_before(
    make_module: Factory, loader: Factory, make_trainer: Factory, tmp_path: Path, read_metrics: Factory
) -> None:
    def attempt(stop: int, ckpt_path: str | None, before: bool) -> None:
        module = make_module()
        trainer = make_trainer(
            callbacks=[RunRecord(), ModelCheckpoint(every_n_train_steps=4, save_top_k=-1)],
            enable_checkpointing=True,
            logger=JSONLinesLogger(tmp_path),
            max_steps=stop,
            max_epochs=-1,
        )
        if before:
            trainer.validate(module, loader(1), verbose=False)
        trainer.fit(module, loader(12), loader(1), ckpt_path=ckpt_path)

    attempt(6, None, before=True)
    first = summary_in(tmp_path)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*step=4*")
    torch.load(checkpoint, weights_only=True)
    attempt(12, str(checkpoint), before=False)
    resumed = summary_in(tmp_path)
    steps = [line["step"] for line in read_metrics(tmp_path) if "train/loss" in line]
    assert steps == list(range(12))
    assert resumed["metrics"]["before"] == first["metrics"]["before"] != {}
    assert resumed["global_step"] == 12


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_write_one_summary(
    make_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    tmp_path: Path,
    read_metrics: Factory,
    capfd: pytest.CaptureFixture[str],
) -> None:
    trainer = make_trainer(
        callbacks=[RunRecord(), StepTimer(every_n_steps=1)],
        logger=JSONLinesLogger(tmp_path),
        strategy="ddp_fork",
        devices=2,
        use_distributed_sampler=False,
    )
    module = make_module(None)
    module.configure_model()  # forked processes hand their weights back to this one
    trainer.fit(module, loader(3), loader(1))
    summary = summary_in(tmp_path)
    assert summary["world_size"] == 2
    assert summary["global_step"] == 3
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "train/loss" in line] == [0, 1, 2]
    assert [line["step"] for line in lines if "time/step" in line] == [0, 1, 2]
    assert capfd.readouterr().out.count("Run finished") == 1


CALLBACKS: dict[str, Callable[[], Callback]] = {
    "RunRecord": RunRecord,
    "StepTimer": lambda: StepTimer(every_n_steps=1, skip_steps=0),
    "GeometryProgressBar": GeometryProgressBar,
    "Reprojection": lambda: Reprojection(every_n_steps=1),
    "RankAdaptation": lambda: RankAdaptation(every_n_steps=1, min_rank=1),
    "SpectraLogger": lambda: SpectraLogger(every_n_steps=1),
}
RECORDERS = ("RunRecord", "StepTimer", "GeometryProgressBar")
SETS = [
    *combinations(RECORDERS, 1),
    *(pair for pair in combinations(CALLBACKS, 2) if set(pair) & set(RECORDERS)),
    tuple(CALLBACKS),
]
MODES: dict[str, dict[str, Any]] = {"": {}, "dev:": {"fast_dev_run": True}, "barebones:": {"barebones": True}}
CASES = [
    pytest.param(names, settings, id=mode + "+".join(names))
    for names in SETS
    for mode, settings in MODES.items()
    if not (mode and len(names) == 2)  # pairs meet in a full run
    and not (mode == "barebones:" and names == ("GeometryProgressBar",))  # such a Trainer refuses progress bars
]


@pytest.mark.parametrize(("names", "settings"), CASES)
def test_alone_and_in_pairs(
    make_module: Factory,
    loader: Factory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, ...],
    settings: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = {"enable_checkpointing": False, "enable_model_summary": False, "logger": False}
    if "barebones" in settings:
        names, quiet = tuple(name for name in names if name != "GeometryProgressBar"), {}
    elif "GeometryProgressBar" not in names:
        quiet["enable_progress_bar"] = False
    trainer = pl.Trainer(
        callbacks=[CALLBACKS[name]() for name in names], accelerator="cpu", max_steps=2, **(quiet | settings)
    )
    trainer.fit(make_module(), loader(2), loader(1))
    written = {entry.name for entry in tmp_path.iterdir()}
    assert written == ({"summary.json"} if "RunRecord" in names and not settings else set())


def test_barebones_shows_nothing(
    make_module: Factory, loader: Factory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = pl.Trainer(callbacks=[RunRecord(str(tmp_path))], accelerator="cpu", max_steps=1, barebones=True)
    trainer.fit(make_module(), loader(1), loader(1))
    assert "Run finished" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_unknown_table_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'sometimes'"):
        RunRecord(table="sometimes")  # type: ignore[arg-type]


def test_git_state_of_a_clean_and_a_changed_repository(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=Someone", "-c", "user.email=someone@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert provenance.git_state(tmp_path) == (None, None)
    git("init", "-q")
    assert provenance.git_state(tmp_path) == (None, None)  # no commit yet
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("the outputs of runs make no commit dirty")
    assert provenance.git_state(tmp_path) == (commit, False)
    (tmp_path / "file").write_text("two")
    assert provenance.git_state(tmp_path) == (commit, True)


def test_versions_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("pytest", "torch", "not-an-installed-package"))
    monkeypatch.setattr(torch, "__version__", "2.0.0+a.build")  # the package's metadata know no build
    found = provenance.versions()
    assert (found["pytest"], found["torch"]) == (pytest.__version__, "2.0.0+a.build")
    assert found["not_an_installed_package"] is None
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert provenance.global_seed() == 17
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert provenance.global_seed() is None


def test_peak_memory_counts_what_was_held_and_released() -> None:
    before = provenance.peak_memory_bytes(torch.device("cpu"))
    assert before is not None
    held = torch.ones(before // 4 + 2**26)  # float32: more than the peak so far, every page written
    expected = held.numel() * 4
    del held
    after = provenance.peak_memory_bytes(torch.device("cpu"))
    assert after is not None
    assert after >= expected
