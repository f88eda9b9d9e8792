"""Every evaluation row is counted once: on one process, on several, and by the module's loss and metrics."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from grit_lightning import GritLitModule
from grit_lightning.datamodules import BoolQDataModule
from grit_lightning.datamodules.pipeline.evaluation_rows import EvaluationSampler
from grit_lightning.datamodules.pipeline.orders import bucketed

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")

Rows = list[dict[str, Any]]
KEYS = ("row", "input_ids", "attention_mask", "target")


@pytest.fixture
def boolq(
    tiny_tokenizer: Any, tmp_path: Path, boolq_rows: Callable[..., Rows], write_jsonl: Callable[[Path, Rows], Path]
) -> Callable[..., BoolQDataModule]:
    """A factory of data modules with 11 validation rows of very different lengths, set up for one process or several."""
    rows = [{**row, "passage": "Long. " * (7 * n % 11) + row["passage"]} for n, row in enumerate(boolq_rows(11))]
    source = str(write_jsonl(tmp_path / "dev.jsonl", rows))

    def make(rank: int = 0, processes: int = 1, **overrides: Any) -> BoolQDataModule:
        module = BoolQDataModule(tiny_tokenizer, source=source, max_length=128, **({"batch_size": 2} | overrides))
        module.setup("validate")
        module.setup("test")
        module.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": processes, "rank": rank})
        return module

    return make


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_all_processes_have_as_many_batches_and_no_row_counts_twice(
    boolq: Callable[..., BoolQDataModule], processes: int
) -> None:
    shares = [list(boolq(rank, processes).val_dataloader()) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    rows = torch.cat([batch["row"] for share in shares for batch in share])
    assert sorted(rows[rows >= 0].tolist()) == list(range(11))
    assert int((rows < 0).sum()) == -11 % processes


def test_a_row_number_finds_the_example_that_the_batch_holds(boolq: Callable[..., BoolQDataModule]) -> None:
    module = boolq(padding_side="left")
    examples = module.examples("validation")
    for batch in module.val_dataloader():
        for row, ids, mask, target in zip(*(batch[k] for k in KEYS), strict=True):
            example = examples[int(row)]
            assert ids[mask.bool()].tolist() == example["input_ids"]
            assert example["length"] == len(example["input_ids"])
            assert module.choices[target] == example["reference"]


def test_rows_of_similar_length_share_a_batch_and_predictions_keep_the_sources_order(
    boolq: Callable[..., BoolQDataModule],
) -> None:
    def padding(loader: Any) -> int:
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in loader)

    module = boolq()
    assert padding(module.val_dataloader()) < padding(module.predict_dataloader()) / 4
    assert torch.cat([batch["row"] for batch in module.predict_dataloader()]).tolist() == list(range(11))


def test_buckets_hold_the_same_rows_sorted_inside_and_shuffled_outside() -> None:
    lengths = torch.randint(1, 500, (103,), generator=torch.Generator().manual_seed(0)).tolist()
    order = bucketed(range(103), lengths, size=10, window=103, seed=1)
    assert sorted(order) == list(range(103))
    batches = [sorted(lengths[row] for row in order[i : i + 10]) for i in range(0, 103, 10)]
    assert len(batches[-1]) == 3
    starts = [batch[0] for batch in batches[:-1]]
    assert starts != sorted(starts)
    by_start = sorted(batches)
    assert all(one[-1] <= other[0] for one, other in pairwise(by_start))


@pytest.mark.parametrize("eval_batch_size", [1, 2, 4, 11])
def test_loss_and_metrics_do_not_depend_on_how_the_rows_are_shared_out(
    boolq: Callable[..., BoolQDataModule], make_tiny_llama: Any, lora_config: Any, eval_batch_size: int
) -> None:
    """Two processes, one after the other into the same sums, give what one process gives with single rows."""

    def measured(module: BoolQDataModule, loaders: list[Any]) -> dict[str, float]:
        lit = GritLitModule(make_tiny_llama(), lora_config())
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        lit.metrics["val"] = module.metrics().clone(prefix="val/")
        batches = DataLoader([batch for loader in loaders for batch in loader], batch_size=None)
        return trainer.validate(lit, batches, verbose=False)[0]

    alone = measured(boolq(batch_size=1), [boolq(eval_batch_size=1).val_dataloader()])
    shares = [boolq(rank, 4, eval_batch_size=eval_batch_size).val_dataloader() for rank in range(4)]
    together = measured(boolq(), shares)
    averages = {f"val/{macro}{name}" for macro in ("", "macro_") for name in ("precision", "recall", "f1")}
    assert together.keys() == alone.keys() == {"val/loss", "val/accuracy", *averages}
    assert together == pytest.approx(alone, rel=1e-5)


def test_predicting_on_the_trainer_keeps_the_order(
    boolq: Callable[..., BoolQDataModule], make_tiny_llama: Any, lora_config: Any
) -> None:
    class Rows(GritLitModule):
        def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return batch["row"]

    trainer = pl.Trainer(barebones=True, accelerator="cpu")
    predicted = trainer.predict(Rows(make_tiny_llama(), lora_config()), datamodule=boolq())
    assert torch.cat(predicted).tolist() == list(range(11))


def test_a_sampler_for_more_processes_than_rows_gives_fillers_alone() -> None:
    assert [list(EvaluationSampler([0], 3, rank)) for rank in range(3)] == [[0], [-1], [-1]]


def test_examples_before_setup_are_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(
        RuntimeError, match=r"The test split of BoolQ: expected one that is set up, got .*\. Call setup\(\)"
    ):
        BoolQDataModule(tiny_tokenizer).examples("test")
