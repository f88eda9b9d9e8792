"""The order of training rows, and how they are laid out in batches.

Shuffled, bucketed or packed, the order depends on seed and epoch and not on workers, and an epoch goes on after any batch;
buckets save padding and lose no row; packed documents keep their tokens, labels and positions; loss and statistics of a step
are the same in every layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor

from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.datamodules import TaskDataModule
from grit_lightning.datamodules.pipeline.packing import pack
from grit_lightning.datamodules.pipeline.resumable import ResumableLoader

TaskCase = Any  # of conftest.py
Make = Callable[..., TaskDataModule]
LAYOUTS: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "bucketed": {"length_bucketing": True},
    "packed": {"packing": True},
}

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


def batches(module: TaskDataModule, epoch: int = 0) -> list[dict[str, Tensor]]:
    loader = loader_of(module)
    loader.sampler.set_epoch(epoch)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*fork", category=DeprecationWarning
        )  # Python 3.12 on forked workers
        found = list(loader)
    CombinedLoader(loader).reset()  # ends the workers as the Trainer does; left to the garbage, they take 20 seconds
    return found


def loader_of(module: TaskDataModule) -> ResumableLoader:
    module.setup("fit")
    loader = module.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    return loader


def same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def uneven(tmp_path: Any, write_jsonl: Any, cases: dict[str, TaskCase], make: Make) -> Callable[..., TaskDataModule]:
    """A factory of GSM8K data modules on 23 training rows of very different lengths, with batches of 3."""
    rows = [{**cases["gsm8k"].row(n), "question": f"What is {n}, " + "and why, " * (n * 7 % 23)} for n in range(30)]
    source = str(write_jsonl(tmp_path / "gsm8k.jsonl", rows))
    return lambda **overrides: make(
        cases["gsm8k"], **({"source": source, "batch_size": 3, "holdout": 0.12} | overrides)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_depends_on_seed_and_epoch_and_not_on_workers(uneven: Callable[..., Any], layout: str) -> None:
    first = batches(uneven(**LAYOUTS[layout]))
    assert same(batches(uneven(**LAYOUTS[layout])), first)
    assert same(batches(uneven(**LAYOUTS[layout], num_workers=2)), first)
    assert not same(batches(uneven(**LAYOUTS[layout]), epoch=1), first)
    assert not same(batches(uneven(**LAYOUTS[layout], seed=7)), first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_epoch_goes_on_after_any_batch_as_if_it_had_not_stopped(uneven: Callable[..., Any], layout: str) -> None:
    whole = batches(uneven(**LAYOUTS[layout]), epoch=3)
    assert len(whole) > 1
    stop = len(whole) // 2
    stopped = loader_of(uneven(**LAYOUTS[layout]))
    stopped.sampler.set_epoch(3)
    begun = iter(stopped)
    for _ in range(stop):
        next(begun)
    resumed = loader_of(uneven(**LAYOUTS[layout]))
    resumed.load_state_dict(stopped.state_dict())
    resumed.sampler.set_epoch(3)
    assert same(list(resumed), whole[stop:])
    other = next(options for name, options in LAYOUTS.items() if name != layout)
    with pytest.raises(
        ValueError, match=r"expected the rows of the run that wrote the checkpoint, got others .*: .*order"
    ):
        loader_of(uneven(**other)).load_state_dict(stopped.state_dict())


def test_buckets_save_padding_and_lose_no_row(uneven: Callable[..., Any]) -> None:
    def padding(found: list[dict[str, Tensor]]) -> int:
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in found)

    def rows(found: list[dict[str, Tensor]]) -> list[list[int]]:
        return sorted(
            ids[mask.bool()].tolist()
            for b in found
            for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
        )

    plain, bucketed = batches(uneven()), batches(uneven(length_bucketing=True))
    assert padding(bucketed) < padding(plain) / 2
    assert rows(bucketed) == rows(plain)


def test_two_processes_train_on_batches_of_the_same_lengths(uneven: Callable[..., Any]) -> None:
    shares = []
    for rank in range(2):
        module = uneven(length_bucketing=True)
        module.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank}, ckpt_path=None)
        shares.append(batches(module))
    assert len(shares[0]) == len(shares[1])
    seen = {
        tuple(ids.tolist())
        for share in shares
        for batch in share
        for ids in batch["input_ids"] * batch["attention_mask"]
    }
    assert len({tuple(i for i in ids if i) for ids in seen}) == len(uneven_rows(uneven))


def uneven_rows(uneven: Callable[..., Any]) -> list[int]:
    module = uneven()
    module.setup("fit")
    return list(module.examples("train")["length"])


def test_every_document_is_packed_once_and_rows_are_well_filled() -> None:
    lengths = torch.randint(1, 200, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = pack(lengths, 256)
    assert sorted(document for row in rows for document in row) == list(range(3000))
    assert max(sum(lengths[document] for document in row) for row in rows) <= 256
    assert len(rows) <= 1.02 * sum(lengths) / 256


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_documents_keep_their_tokens_labels_and_positions(uneven: Callable[..., Any], side: str) -> None:
    module = uneven(packing=True, padding_side=side)
    found = []
    for batch in batches(module):
        for ids, mask, labels, positions in zip(
            *(batch[key] for key in ("input_ids", "attention_mask", "labels", "position_ids")), strict=True
        ):
            real = mask.bool()
            starts = [*torch.nonzero(positions[real] == 0).flatten().tolist(), int(real.sum())]
            for start, end in pairwise(starts):
                assert positions[real][start:end].tolist() == list(range(end - start))
                found.append((ids[real][start:end].tolist(), labels[real][start:end].tolist()))
    expected = [
        (row["input_ids"], [-100] * row["prompt_length"] + row["input_ids"][row["prompt_length"] :])
        for row in module.examples("train")
    ]
    assert sorted(found) == sorted(expected)
    assert max(batch["input_ids"].shape[1] for batch in batches(module)) <= module.max_length


def trained(
    module: TaskDataModule, make_tiny_llama: Any, lora_config: Any
) -> tuple[float, GritLitModule, dict[str, float]]:
    """Loss and statistics of one step over all training rows, then the validation loss."""
    llama = make_tiny_llama(max_position_embeddings=2048)
    config = GeometryConfig(kfac_min_samples=1, ng_warmup_steps=None)
    lit = GritLitModule(llama, lora_config(), config, lambda p: torch.optim.SGD(p, lr=0.0), lr_scheduler=None)
    lit.configure_model()
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in lit.parameters() if p.requires_grad):  # the same in both runs, and B not zero
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    options: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, num_sanity_val_steps=0, **options)
    trainer.fit(lit, datamodule=module)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics.pop("train/loss"), lit, metrics


@pytest.mark.parametrize(
    "layout",
    [
        {"padding_side": "left"},
        {"packing": True},
        {"packing": True, "padding_side": "left", "eval_batch_size": 1},
        {"length_bucketing": True, "eval_batch_size": 7},
    ],
    ids=str,
)
def test_loss_and_statistics_do_not_depend_on_the_layout_of_batches(
    uneven: Callable[..., Any], make_tiny_llama: Any, lora_config: Any, layout: dict[str, Any]
) -> None:
    loss, lit, metrics = trained(uneven(batch_size=64), make_tiny_llama, lora_config)
    other_loss, other, other_metrics = trained(uneven(batch_size=64, **layout), make_tiny_llama, lora_config)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert other_metrics == pytest.approx(metrics, rel=1e-5)
    assert lit.geometry is not None
    assert other.geometry is not None
    for name, view in lit.geometry.layers.items():
        found = other.geometry.layers[name]
        assert found.n_samples == view.n_samples > 0
        torch.testing.assert_close(found.a_cov, view.a_cov, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(found.g_cov, view.g_cov, rtol=1e-3, atol=1e-10)


def test_packing_and_buckets_exclude_each_other(cases: dict[str, TaskCase], tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="length_bucketing and packing: expected at most one of them, got both"):
        cases["qnli"].cls(tiny_tokenizer, length_bucketing=True, packing=True)
