"""SpectraLogger: what reaches loggers and when.

Proven here: every layer's value and the mean over layers reach every logger, at the optimizer step they belong to; TensorBoard
also gets histograms and the picture of the ranks. What is measured is tested in tests/telemetry.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grit_lightning.callbacks import RankAdaptation, SpectraLogger
from grit_lightning.runs.metrics_log import JSONLinesLogger


def test_every_layer_and_the_mean_reach_every_logger_at_the_step_they_belong_to(
    make_module: Callable[..., Any], loader: Callable[..., Any], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    module = make_module()
    loggers = [JSONLinesLogger(tmp_path), TensorBoardLogger(tmp_path, name="", version="")]
    callbacks = [RankAdaptation(every_n_steps=2, threshold=0.5, min_rank=1), SpectraLogger(every_n_steps=2)]
    trainer = make_trainer(logger=loggers, callbacks=callbacks, max_steps=4, log_every_n_steps=100)
    trainer.fit(module, loader(), loader(1))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines if "grit/rank" in line}
    assert sorted(by_step) == [1, 3]  # after optimizer steps 2 and 4, counted from 0 as Lightning's loggers do
    names = [name.removeprefix("base_model.model.") for name in module.geometry.layers]
    for quantity in ("rank", "effective_rank_a", "effective_rank_g", "participation_ratio_a", "spectral_entropy_g"):
        values = [by_step[3][f"grit/{quantity}/{name}"] for name in names]
        assert abs(by_step[3][f"grit/{quantity}"] - sum(values) / len(values)) < 1e-5
    assert [by_step[3][f"grit/rank/{name}"] for name in names] == list(module.geometry.ranks.values())
    assert by_step[3]["grit/rejected"] == by_step[3]["grit/fallbacks"] == 0.0
    assert trainer.callback_metrics["grit/rank"] == module.geometry.mean_rank

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("grit/rank")] == [1, 3]
    assert "grit/spectrum_a" in events.Tags()["histograms"]
    assert "grit/rank_map" in events.Tags()["images"]
