"""Log-likelihoods of token sequences: what is scored, and that batches, padding and processes change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from grit_lightning.batches import position_ids
from grit_lightning.forgetting.likelihood import TokenSequence, log_likelihoods, make_batch

SEQUENCES = [
    TokenSequence([10, 11, 12, 13, 14], 3),
    TokenSequence([20, 21]),
    TokenSequence([30, 31, 32, 33, 34, 35, 36], 6),
    TokenSequence([40, 41, 42]),
    TokenSequence([50, 51, 52, 53], 2),
]
CPU = torch.device("cpu")
FLOAT64_ROUNDING = 1e-10  # of sums of a few log-probabilities


@torch.no_grad()
def reference(model: nn.Module, sequence: TokenSequence) -> float:
    """One unpadded row, token by token: no mask, no positions, no cross-entropy."""
    log_probabilities = model(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
    return sum(float(log_probabilities[i - 1, sequence.ids[i]]) for i in range(sequence.start, len(sequence.ids)))


@pytest.fixture(params=["relative positions", "absolute positions"])
def model(request: pytest.FixtureRequest, make_tiny_llama: Callable[..., Any]) -> nn.Module:
    if request.param == "relative positions":
        return make_tiny_llama().double().eval()
    config = GPT2Config(vocab_size=320, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5)
    return GPT2LMHeadModel(config).double().eval()


def logits_of(model: nn.Module, calls: list[int] | None = None, kept: int | None = None) -> Callable[..., Tensor]:
    def forward(batch: dict[str, Tensor]) -> Tensor:
        if calls is not None:
            calls.append(len(batch["input_ids"]))
        mask = batch["attention_mask"]
        logits = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=position_ids(mask)).logits
        return logits if kept is None else logits[:, -kept:]

    return forward


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_scores_equal_those_of_single_unpadded_rows(model: nn.Module, batch_size: int) -> None:
    scores = log_likelihoods(logits_of(model), SEQUENCES, batch_size, CPU)
    expected = torch.tensor([reference(model, sequence) for sequence in SEQUENCES], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, atol=FLOAT64_ROUNDING, rtol=0)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_processes_share_the_work_and_call_the_model_equally_often(
    make_tiny_llama: Callable[..., Any], world_size: int
) -> None:
    model = make_tiny_llama().double().eval()
    calls: list[list[int]] = [[] for _ in range(world_size)]
    parts = [
        log_likelihoods(logits_of(model, calls[rank]), SEQUENCES, 2, CPU, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(made) for made in calls}) == 1
    assert (torch.stack(parts) != 0).sum(0).tolist() == [1] * len(SEQUENCES)  # nothing is counted twice
    expected = torch.tensor([reference(model, sequence) for sequence in SEQUENCES], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(parts).sum(0), expected, atol=FLOAT64_ROUNDING, rtol=0)


def test_logits_of_the_last_positions_are_enough(make_tiny_llama: Callable[..., Any]) -> None:
    model = make_tiny_llama().double().eval()
    sequences = [TokenSequence([1, 2, 3, 4, 5, 6], 4), TokenSequence([7, 8, 9, 10, 11, 12], 5)]
    whole = log_likelihoods(logits_of(model), sequences, 2, CPU)
    assert torch.equal(log_likelihoods(logits_of(model, kept=3), sequences, 2, CPU), whole)


def test_half_precision_logits_are_summed_in_float32() -> None:
    def forward(batch: dict[str, Tensor]) -> Tensor:
        return torch.zeros(*batch["input_ids"].shape, 320, dtype=torch.bfloat16)

    sequence = TokenSequence(list(range(100)))
    score = log_likelihoods(forward, [sequence], 1, CPU)
    assert score.dtype == torch.float32
    assert float(score) == pytest.approx(-99 * torch.log(torch.tensor(320.0)).item(), rel=1e-6)


def test_a_cut_takes_context_before_anything_else() -> None:
    sequence = TokenSequence([1, 2, 3, 4, 5], 3)
    assert sequence.last(9) == sequence
    assert sequence.last(4) == TokenSequence([2, 3, 4, 5], 2)
    assert sequence.last(2) == TokenSequence([4, 5], 1)  # the first token of all is never predicted


def test_batches_have_the_keys_of_training_batches() -> None:
    batch = make_batch(SEQUENCES[:2], CPU)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14], [20, 21, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 13, 14], [-100, 21, -100, -100, -100]]
