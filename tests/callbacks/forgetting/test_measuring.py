"""What is measured: losses as transformers computes them, before and after, alone and on two processes; what is refused.

Without its adapter the model is the backbone to the bit, and one that moves is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from grit_lightning.callbacks import (
    RunRecord,
)
from grit_lightning.forgetting import TextData
from grit_lightning.runs.metrics_log import JSONLinesLogger

Factory = Callable[..., Any]
FLOAT32_ROUNDING = 1e-5  # of a mean loss, between batches of different shape


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_before_is_the_backbone_and_the_backbone_stays(
    quick_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    probe: Factory,
    tmp_path: Path,
    precision: str,
    lines: Factory,
    summary: Factory,
) -> None:
    trainer = make_trainer(callbacks=[probe(), RunRecord()], logger=JSONLinesLogger(tmp_path), precision=precision)
    trainer.fit(quick_module(), loader(6))
    row = summary(tmp_path)["forgetting"]["prose"]["loss"]
    assert row["before"] == row["adapter_off_before"] == row["adapter_off_after"]  # to the bit: B = 0
    written = lines(tmp_path, "forgetting.jsonl")

    def nats(when: str, adapter: bool) -> list[float]:
        return [e["nats"] for e in written if (e["when"], e["adapter"]) == (when, adapter) and "nats" in e]

    assert nats("before", True) == nats("before", False) == nats("after", False) != nats("after", True)
    assert abs(row["delta"]) > 1e-3  # so that the rest of the test means something
    assert row["interval"][0] < row["delta"] < row["interval"][1]
    assert row["delta"] == pytest.approx(row["after"] - row["before"], abs=1e-12)


def test_losses_are_those_of_transformers(
    quick_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    probe: Factory,
    tmp_path: Path,
    tiny_tokenizer: Any,
    summary: Factory,
    text: str,
) -> None:
    module = quick_module()
    make_trainer(callbacks=[probe(), RunRecord()]).fit(module, loader(6))
    found = summary(tmp_path)["forgetting"]
    stream = torch.tensor(tiny_tokenizer(text, add_special_tokens=False).input_ids)
    module.peft_model.eval()
    with torch.no_grad():
        rows = stream[: 7 * 32].view(7, 1, 32)
        after = torch.stack([module.peft_model(row, labels=row).loss for row in rows]).mean()
        with module.peft_model.disable_adapter():
            before = torch.stack([module.peft_model(row, labels=row).loss for row in rows]).mean()
    assert (found["prose"]["blocks"], found["prose"]["tokens"]) == (7, 7 * 31)
    assert found["prose"]["loss"]["after"] == pytest.approx(float(after), abs=FLOAT32_ROUNDING)
    assert found["prose"]["loss"]["before"] == pytest.approx(float(before), abs=FLOAT32_ROUNDING)
    assert found["arc_easy"]["questions"] == 5
    assert 0 <= found["arc_easy"]["acc_norm"]["after"] <= 1


def test_a_backbone_that_moves_is_reported(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory
) -> None:
    class Moves(Callback):
        @torch.no_grad()
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.peft_model.get_base_model().model.norm.weight.mul_(1.2)

    with pytest.warns(UserWarning, match="without its adapter the model's loss on prose went from"):
        make_trainer(callbacks=[probe(), Moves()]).fit(quick_module(), loader(2))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_share_the_work_and_get_the_same(
    quick_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    probe: Factory,
    tmp_path: Path,
    lines: Factory,
    summary: Factory,
) -> None:
    make_trainer(callbacks=[RunRecord(), probe()]).fit(quick_module({"lora_dropout": 0.0}, geometry=None), loader(1))
    alone = summary(tmp_path)["forgetting"]
    module = quick_module({"lora_dropout": 0.0}, geometry=None)
    module.configure_model()  # forked processes hand their weights back to this one
    make_trainer(
        callbacks=[RunRecord(), probe()],
        logger=JSONLinesLogger(tmp_path),
        strategy="ddp_fork",
        devices=2,
        use_distributed_sampler=False,
    ).fit(module, loader(1))
    shared = summary(tmp_path)["forgetting"]
    assert (shared["prose"]["blocks"], shared["prose"]["tokens"], shared["arc_easy"]["questions"]) == (7, 217, 5)
    for when in ("before", "after", "delta", "adapter_off_before", "adapter_off_after"):
        assert shared["prose"]["loss"][when] == pytest.approx(alone["prose"]["loss"][when], abs=FLOAT32_ROUNDING)
    assert shared["arc_easy"]["acc"]["before"] == alone["arc_easy"]["acc"]["before"]
    events = lines(tmp_path, "forgetting.jsonl")
    assert len([e for e in events if e["when"] == "before" and e["adapter"]]) == 7 + 5  # one process writes


def test_blocks_longer_than_the_context_are_refused(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory
) -> None:
    with pytest.raises(ValueError, match=r"at most 128 tokens, .* got 256 for a block of text\. Lower Forgetting"):
        make_trainer(callbacks=[probe(block_size=256)]).fit(quick_module(), loader(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": None, "zero_shot": None}, "expected something to measure, got neither texts nor zero_shot tasks"),
        (
            {"texts": [TextData("a/x.txt"), TextData("b/x.txt")]},
            "expected data sets with different names, got several called x",
        ),
        ({"block_size": 1}, "block_size: expected an integer ≥ 2, got 1"),
        ({"max_blocks": 0}, "max_blocks: expected an integer ≥ 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected an integer ≥ 1, got 0"),
        ({"every_n_steps": 0}, "every_n_steps: expected an integer ≥ 1"),
        ({"confidence": 1.0}, r"confidence: expected a number in \(0, 1\), got 1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(probe: Factory, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(**settings)


def test_a_model_without_adapter_and_a_run_without_tokenizer_are_refused(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory
) -> None:
    class Plain(pl.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("never trained")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])

    with pytest.raises(Exception, match=r"expected Plain\.model to be a PEFT model, .* got NoneType"):
        make_trainer(callbacks=[probe()]).fit(Plain(), loader(1))
    with pytest.raises(Exception, match=r"ForgettingProbe\.tokenizer: expected a tokenizer .*, got none"):
        make_trainer(callbacks=[probe(tokenizer=None)]).fit(quick_module(), loader(1))
