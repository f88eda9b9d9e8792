"""How tokens are laid out in batches must not show in the statistics: padding, packing, micro-batches, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

Batch = dict[str, Tensor]


def rolled(batch: Batch, by: list[int]) -> Batch:
    """Move the padding at the end of every row to its start."""
    return {key: torch.stack([row.roll(n) for row, n in zip(value, by, strict=True)]) for key, value in batch.items()}


def split(batch: Batch, size: int) -> list[Batch]:
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, len(batch["input_ids"]), size)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt", [0, 2])
def test_padding_changes_neither_statistics_nor_loss(
    side: str, prompt: int, make_module: Any, random_batch: Any, fit: Any, truth: Any, assert_agrees: Any
) -> None:
    pad = [0, 3, 8, 1]
    batch = random_batch(batch=4, length=12, pad=pad, prompt=prompt)
    module = make_module()
    expected = truth(module.peft_model, [batch])
    trainer = fit(module, [rolled(batch, pad) if side == "left" else batch])
    assert_agrees(module.geometry, expected)
    assert {view.n_samples for view in module.geometry} == {int(batch["attention_mask"].sum())}
    # A first token has nothing before it, padding least of all: every row learns from its second one on.
    alone = [module({k: v[i : i + 1, : 12 - n] for k, v in batch.items()}).loss for i, n in enumerate(pad)]
    counts = torch.tensor([12 - n - max(prompt, 1) for n in pad])
    mean = (torch.stack(alone).detach() * counts).sum() / counts.sum()
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], mean, rtol=1e-5, atol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pads", [(0, 2), (2, 0)], ids=["right", "left"])
def test_documents_packed_into_rows_give_the_statistics_of_separate_documents(
    attention: str, pads: tuple[int, int], make_module: Any, random_batch: Any, fit: Any, truth: Any, assert_agrees: Any
) -> None:
    left, right = pads
    batch = random_batch(batch=2, length=14, pad=0)
    restarts = torch.zeros(2, 14, dtype=torch.long)
    for row, lengths in enumerate([(5, 4, 3), (2, 10)]):
        restarts[row, left : 14 - right] = torch.cat([torch.arange(length) for length in lengths])
    real = torch.zeros(2, 14, dtype=torch.bool)
    real[:, left : 14 - right] = True
    batch = {
        "input_ids": batch["input_ids"].masked_fill(~real, 0),
        "attention_mask": real.long(),
        "labels": batch["labels"].masked_fill(~real, -100),  # those of a document's first token are not to be learnt
        "position_ids": restarts,
    }
    module = make_module(attn_implementation=attention)
    expected = truth(module.peft_model, [batch])
    fit(module, [batch])
    assert_agrees(module.geometry, expected)
    assert {view.n_samples for view in module.geometry} == {24}


@pytest.mark.parametrize("pads", [1, 4])
def test_explicit_positions_of_unpacked_rows_do_not_let_padding_in(
    pads: int, make_module: Any, random_batch: Any, fit: Any, truth: Any, assert_agrees: Any
) -> None:
    batch = random_batch(batch=2, length=12, pad=pads)
    module = make_module()
    expected = truth(module.peft_model, [batch])
    positions = torch.arange(12).expand(2, -1)  # counting the padding in: rotary embeddings see differences only
    fit(module, [rolled(batch, [pads, pads]) | {"position_ids": positions}])
    assert_agrees(module.geometry, expected)


def test_packing_is_refused_where_documents_could_not_be_kept_apart(
    make_module: Any, random_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module()
    batch = random_batch(batch=2, length=8)
    batch["position_ids"] = torch.arange(4).repeat(2, 2)
    module.peft_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"expected batches of one row, .* got 2 rows\. Set data\.batch_size to 1"):
        module(batch)
    monkeypatch.setattr(module, "_model_arguments", frozenset({"input_ids"}))
    with pytest.raises(ValueError, match="got LlamaForCausalLM, which takes none"):
        module(batch)


@pytest.mark.parametrize(
    ("size", "accumulate"),
    [(8, 1), (4, 2), (1, 8), (3, 2), (1, 3)],
    ids=["1x8", "2x4", "8x1", "last window of one micro-batch", "last window of two"],
)
def test_micro_batches_of_any_size_give_the_statistics_of_all_samples(
    size: int, accumulate: int, make_module: Any, random_batch: Any, fit: Any, truth: Any, assert_agrees: Any
) -> None:
    batch = random_batch(batch=8, length=12, pad=[0, 3, 5, 1, 0, 7, 2, 4], prompt=2)  # unequal label counts
    module = make_module()
    expected = truth(module.peft_model, [batch])
    trainer = fit(module, split(batch, size), accumulate_grad_batches=accumulate)
    assert trainer.global_step == -(-8 // size // accumulate) if 8 % size == 0 else 2
    assert_agrees(module.geometry, expected)
    assert {view.n_samples for view in module.geometry} == {int(batch["attention_mask"].sum())}


class EvaluatesInside(Callback):
    """Runs the model between the forward and the backward pass of every micro-batch, as a probe might."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    @torch.no_grad()
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        pl_module(self.batch)


def test_evaluation_passes_in_between_leave_no_trace(
    make_module: Callable[..., Any], random_batch: Any, fit: Any
) -> None:
    batches = [random_batch(batch=2, length=10, pad=[0, 3], seed=seed) for seed in range(4)]
    other = random_batch(batch=2, length=10, seed=9)
    undisturbed, disturbed = make_module(), make_module()
    fit(undisturbed, batches, accumulate_grad_batches=2)
    fit(
        disturbed, batches, [other], accumulate_grad_batches=2, val_check_interval=1,
        num_sanity_val_steps=1, callbacks=[EvaluatesInside(other)],
    )  # fmt: skip
    for name, view in undisturbed.geometry.layers.items():
        found = disturbed.geometry.layers[name]
        assert found.n_samples == view.n_samples == sum(int(batch["attention_mask"].sum()) for batch in batches)
        assert torch.equal(found.a_cov, view.a_cov)
        assert torch.equal(found.g_cov, view.g_cov)
