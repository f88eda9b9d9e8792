"""GeometryProgressBar: what it shows, and how little of it where there is no terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest

from grit_lightning.callbacks import GeometryProgressBar
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
