"""The bar: what it shows, and how little of it where there is no terminal. The lines that stand for it there."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest

from grit_lightning.callbacks import GeometryProgressBar, ProgressLines
from grit_lightning.runs.metrics_log import JSONLinesLogger


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_refreshes_at_every_batch_in_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_MINITERS", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert GeometryProgressBar().refresh_rate == 100
    assert GeometryProgressBar(refresh_rate=7).refresh_rate == 7
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert GeometryProgressBar().refresh_rate == 1


@pytest.mark.parametrize("geometry", ["default", None])
def test_shows_loss_and_mean_rank(
    make_module: Callable[..., Any],
    loader: Callable[..., Any],
    make_trainer: Callable[..., pl.Trainer],
    tmp_path: Any,
    capsys: pytest.CaptureFixture[str],
    geometry: str | None,
) -> None:
    bar = GeometryProgressBar()
    module = make_module() if geometry else make_module(None)
    trainer = make_trainer(callbacks=[bar], enable_progress_bar=True, logger=JSONLinesLogger(tmp_path))
    trainer.fit(module, loader(30), loader(2))
    shown = capsys.readouterr().out
    assert "train/loss=" in shown
    assert ("rank=4.0" in shown) == (geometry is not None)
    assert "v_num" not in shown
    assert shown.count("Epoch 0") <= 8  # not 30


def test_disabled_by_a_barebones_trainer_and_by_refresh_rate_zero(
    make_module: Callable[..., Any], loader: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], capsys: Any
) -> None:
    make_trainer(callbacks=[GeometryProgressBar(refresh_rate=0)], enable_progress_bar=True).fit(
        make_module(), loader(2), loader(1)
    )
    assert capsys.readouterr().out == ""


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("geometry", ["default", None])
def test_a_line_every_few_steps_says_the_step_the_loss_and_the_rank(
    make_module: Callable[..., Any],
    loader: Callable[..., Any],
    make_trainer: Callable[..., pl.Trainer],
    capsys: pytest.CaptureFixture[str],
    geometry: str | None,
) -> None:
    module = make_module() if geometry else make_module(None)
    trainer = make_trainer(
        callbacks=[ProgressLines(every_n_steps=2)], enable_progress_bar=True, max_steps=5, limit_val_batches=0
    )
    trainer.fit(module, loader(10), loader(1))
    shown = lines(capsys)
    assert [line.partition(",")[0] for line in shown] == ["step 2/5", "step 4/5", "step 5/5"]  # the last one as well
    for line in shown:
        assert re.search(r"train/loss \d+\.\d+, " + ("rank 4, " if geometry else "") + r"\d+\.\d\d s a step$", line)


def test_lines_count_optimizer_steps_and_keep_the_trainers_interval(
    make_module: Callable[..., Any], loader: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], capsys: Any
) -> None:
    settings = {
        "accumulate_grad_batches": 2,
        "log_every_n_steps": 2,
        "max_epochs": 2,
        "max_steps": -1,
        "limit_val_batches": 0,
    }
    make_trainer(callbacks=[ProgressLines()], enable_progress_bar=True, **settings).fit(
        make_module(), loader(4), loader(1)
    )
    assert [line.partition(":")[0] for line in lines(capsys)] == ["step 2, epoch 0", "step 4, epoch 1"]


@pytest.mark.parametrize(("batches", "shown"), [(9, [3, 5, 7, 9]), (4, [1, 2, 3, 4]), (2, [1, 2]), (1, [1])])
def test_an_evaluation_has_at_most_four_lines(
    make_module: Callable[..., Any],
    loader: Callable[..., Any],
    make_trainer: Callable[..., pl.Trainer],
    capsys: pytest.CaptureFixture[str],
    batches: int,
    shown: list[int],
) -> None:
    trainer = make_trainer(callbacks=[ProgressLines()], enable_progress_bar=True)
    for stage, word in ((trainer.validate, "Validation"), (trainer.test, "Testing")):
        stage(make_module(), loader(batches), verbose=False)
        assert lines(capsys) == [f"{word}: {done}/{batches} batches" for done in shown]


def test_lines_are_silent_when_disabled_and_in_a_sanity_check(
    make_module: Callable[..., Any], loader: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], capsys: Any
) -> None:
    progress = ProgressLines(every_n_steps=1)
    trainer = make_trainer(callbacks=[progress], enable_progress_bar=True, max_steps=1, num_sanity_val_steps=1)
    trainer.fit(make_module(), loader(2), loader(1))
    assert [line.partition(":")[0] for line in lines(capsys)] in (
        ["step 1/1, epoch 0"],
        ["step 1/1, epoch 0", "Validation"],
    )
    progress.disable()
    trainer.validate(make_module(), loader(1), verbose=False)
    assert lines(capsys) == []
    progress.enable()
    trainer.validate(make_module(), loader(1), verbose=False)
    assert lines(capsys) == ["Validation: 1/1 batches"]


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ProgressLines.every_n_steps: expected an integer ≥ 1, got 0"):
        ProgressLines(every_n_steps=0)
