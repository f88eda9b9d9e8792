"""Where results go: loggers, the run's folder, the summary and its table, also of runs that are short, silent or fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from grit_lightning.callbacks import (
    RunRecord,
    SpectraLogger,
    StepTimer,
)
from grit_lightning.runs.metrics_log import JSONLinesLogger

Factory = Callable[..., Any]


def test_loggers_get_values_and_changes(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory, tmp_path: Path, lines: Factory
) -> None:
    tensorboard = TensorBoardLogger(tmp_path, name="", version="")
    seen: dict[str, list[int]] = {}
    original = tensorboard.log_metrics

    def log_metrics(metrics: Mapping[str, float], step: int | None = None) -> None:
        for key in metrics:
            seen.setdefault(key, []).append(-1 if step is None else step)
        original(metrics, step)

    tensorboard.log_metrics = log_metrics  # type: ignore[method-assign,assignment]
    trainer = make_trainer(
        callbacks=[probe(every_n_steps=2), SpectraLogger(every_n_steps=2), StepTimer(every_n_steps=2)],
        logger=[JSONLinesLogger(tmp_path), tensorboard],
        max_steps=6,
        max_epochs=-1,
    )
    trainer.fit(quick_module(), loader(6))
    written: dict[str, list[int]] = {}
    for line in lines(tmp_path, "metrics.jsonl"):
        for key in line.keys() - {"step", "epoch"}:
            written.setdefault(key, []).append(line["step"])
    expected = {
        **{f"forgetting/{name}": [0, 1, 3, 5] for name in ("prose/loss", "arc_easy/acc", "arc_easy/acc_norm")},
        **{f"forgetting/{name}_delta": [0, 1, 3, 5] for name in ("prose/loss", "arc_easy/acc", "arc_easy/acc_norm")},
        "forgetting/prose/loss_adapter_off": [0, 5],
    }
    for name in [name for name in expected if name.endswith("_delta")]:
        expected[name] = [1, 3, 5]
    assert {key: steps for key, steps in written.items() if key.startswith("forgetting/")} == expected
    assert {key: steps for key, steps in seen.items() if key.startswith("forgetting/")} == expected
    assert trainer.callback_metrics["forgetting/prose/loss_delta"]  # for early stopping; of step 4
    events = lines(tmp_path, "forgetting.jsonl")
    assert [e["block"] for e in events if e["when"] == "after" and e["adapter"] and e["data"] == "prose"] == [*range(7)]
    questions = [e for e in events if e["when"] == "after" and e["data"] == "arc_easy"]
    assert [e["question"] for e in questions] == [*range(5)]
    assert all(len(e["log_likelihoods"]) == 2 and {e["acc"], e["acc_norm"]} <= {0.0, 1.0} for e in questions)


def test_the_record_and_the_table_show_the_change(
    quick_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    probe: Factory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    summary: Factory,
) -> None:
    make_trainer(callbacks=[RunRecord(), probe(confidence=0.9)]).fit(quick_module(), loader(4))
    row = summary(tmp_path)["forgetting"]["prose"]["loss"]
    shown = capsys.readouterr().out
    for text in ("prose loss", f"{row['before']:.4f}", f"{row['delta']:+.4f}", "90% interval", "arc_easy acc_norm"):
        assert text in shown
    assert f"{row['interval'][0]:+.4f} … {row['interval'][1]:+.4f}" in shown


@pytest.mark.parametrize(
    "settings", [{"fast_dev_run": True}, {"barebones": True}, {}], ids=["dev", "barebones", "no logger"]
)
def test_without_logger_and_in_short_runs(
    quick_module: Factory,
    loader: Factory,
    probe: Factory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    quiet = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
    }
    trainer = pl.Trainer(
        callbacks=[callback := probe(every_n_steps=1)],
        accelerator="cpu",
        max_steps=2,
        **({} if "barebones" in settings else quiet),
        **settings,
    )
    trainer.fit(quick_module(geometry=None), loader(2))
    report = callback.report()
    if "barebones" in settings:
        assert report == {}
    else:
        blocks = 3 if "fast_dev_run" in settings else 7  # one batch
        assert report["forgetting"]["prose"]["blocks"] == blocks
        assert report["forgetting"]["prose"]["loss"]["delta"] is not None
    assert list(folder.iterdir()) == []


def test_a_run_that_fails_records_what_was_measured(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory, tmp_path: Path, summary: Factory
) -> None:
    class Fails(Callback):
        def on_after_backward(self, *_: Any) -> None:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        make_trainer(callbacks=[RunRecord(), probe(), Fails()]).fit(quick_module(), loader(2))
    row = summary(tmp_path)["forgetting"]["prose"]["loss"]
    assert row["before"] > 0
    assert row["after"] is row["delta"] is row["interval"] is None
