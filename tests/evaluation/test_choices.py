"""Closed answers: scores are those of single unpadded rows, and metrics are those counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from grit_lightning.batches import position_ids
from grit_lightning.datamodules.pipeline.collate import Collator
from grit_lightning.evaluation.choices import choice_scores, classification_metrics

PROMPTS = [[10, 11, 12, 13, 14], [20, 21], [30, 31, 32]]


@torch.no_grad()
def reference_score(model: nn.Module, prompt: list[int], choice: list[int]) -> float:
    """Log-likelihood per token of one choice, from one unpadded row: no masks, no positions, no batch."""
    log_probabilities = model(torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
    picked = [log_probabilities[len(prompt) - 1 + i, token] for i, token in enumerate(choice)]
    return float(sum(picked) / len(choice))


def make_batch(choices: list[list[int]], side: str, append: tuple[int, ...] = ()) -> dict[str, Tensor]:
    width = max(map(len, choices))
    choice_ids = torch.tensor([choice + [-100] * (width - len(choice)) for choice in choices])
    answers = [choices[i % len(choices)] for i in range(len(PROMPTS))]
    rows = [
        {"input_ids": prompt + answer + list(append), "prompt_length": len(prompt), "target": i % len(choices)}
        for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ]
    return Collator(pad_id=0, padding_side=side, choice_ids=choice_ids)(rows)  # type: ignore[arg-type]


@torch.no_grad()
def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"]
    return model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=position_ids(mask)).logits


@pytest.fixture(params=["relative positions", "absolute positions"])
def model(request: pytest.FixtureRequest, make_tiny_llama: Callable[..., Any]) -> nn.Module:
    """A float64 Llama, and a GPT-2, where a position that padding has shifted changes the output."""
    if request.param == "relative positions":
        return make_tiny_llama().double().eval()
    config = GPT2Config(vocab_size=320, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5)
    return GPT2LMHeadModel(config).double().eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("append", [(), (2,)], ids=["answer only", "answer and end of sequence"])
@pytest.mark.parametrize(
    "choices", [[[50], [60]], [[50], [60], [70]], [[50, 51], [60, 61]], [[50], [60, 61, 62]]], ids=str
)
def test_scores_equal_those_of_single_unpadded_rows(
    model: nn.Module, choices: list[list[int]], side: str, append: tuple[int, ...]
) -> None:
    batch = make_batch(choices, side, append)
    scores = choice_scores(model, batch, forward(model, batch))
    expected = [[reference_score(model, prompt, choice) for choice in choices] for prompt in PROMPTS]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=2e-6, rtol=1e-6)  # scores are float32


def test_one_token_choices_take_no_further_forward(model: nn.Module) -> None:
    batch = make_batch([[50], [60]], "right")
    logits = forward(model, batch)

    def refuse(*_: Any) -> None:
        raise AssertionError("the model was called")

    model.register_forward_pre_hook(refuse)
    choice_scores(model, batch, logits)


def test_a_choice_that_a_row_does_not_have_is_never_predicted(model: nn.Module) -> None:
    batch = make_batch([[50], [60], [70]], "left")
    batch["choice_ids"][1, 2] = -100
    scores = choice_scores(model, batch, forward(model, batch))
    assert scores[1, 2] == -torch.inf
    assert scores.isfinite().sum() == scores.numel() - 1


@pytest.mark.parametrize("prompt_length", [0, 5], ids=["no prompt", "no label"])
def test_a_row_without_prompt_or_label_is_refused(model: nn.Module, prompt_length: int) -> None:
    batch = Collator(0, "left", torch.tensor([[50], [60]]))(
        [{"input_ids": [1, 2, 3, 4, 50], "prompt_length": prompt_length, "target": 0}]
    )
    with pytest.raises(ValueError, match=r"expected a prompt followed by labels in every row, got 1 of 1 rows without"):
        choice_scores(model, batch, torch.zeros(1, 5, 320))


def test_models_without_positions_are_scored_too() -> None:
    class Alibi(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return type("Output", (), {"logits": nn.functional.one_hot(input_ids, 80).double()})

    batch = make_batch([[50, 51], [50, 50]], "right")
    scores = choice_scores(Alibi(), batch, torch.zeros(3, 7, 80))
    assert (scores[:, 1] > scores[:, 0]).all()  # this model predicts that every token repeats


# By hand, of the seven rows below: class 1 has precision 2/4, recall 2/3; class 0 precision 2/3, recall 2/4; F1 of both is 4/7.
MACRO = {"macro_precision": (2 / 4 + 2 / 3) / 2, "macro_recall": (2 / 3 + 2 / 4) / 2, "macro_f1": 4 / 7}


def test_binary_metrics_take_class_one_as_positive() -> None:
    predicted, target = torch.tensor([1, 1, 1, 0, 0, 0, 1]), torch.tensor([1, 0, 1, 1, 0, 0, 0])
    true_positive, false_positive, false_negative, true_negative = 2, 2, 1, 2  # counted by hand
    metrics = classification_metrics(2)
    metrics.update(predicted[:3], target[:3])
    metrics.update(predicted[3:], target[3:])
    precision = true_positive / (true_positive + false_positive)
    recall = true_positive / (true_positive + false_negative)
    assert {name: float(value) for name, value in metrics.compute().items()} == pytest.approx(
        {
            "accuracy": (true_positive + true_negative) / 7,
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
        }
        | MACRO
    )


def test_macro_averages_of_two_classes_do_not_depend_on_which_is_positive() -> None:
    predicted, target = torch.tensor([1, 1, 1, 0, 0, 0, 1]), torch.tensor([1, 0, 1, 1, 0, 0, 0])
    for one, other in ((predicted, target), (1 - predicted, 1 - target)):
        metrics = classification_metrics(2)
        metrics.update(one, other)
        found = {name: float(value) for name, value in metrics.compute().items() if name.startswith("macro_")}
        assert found == pytest.approx(MACRO)


def test_always_the_same_class_is_seen_in_the_macro_average() -> None:
    metrics = classification_metrics(2)
    metrics.update(torch.ones(4, dtype=torch.long), torch.tensor([1, 1, 1, 0]))
    found = metrics.compute()
    assert float(found["recall"]) == 1.0
    assert float(found["macro_recall"]) == pytest.approx(1 / 2)


def test_metrics_over_more_classes_are_macro_averages() -> None:
    predicted, target = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 0]
    metrics = classification_metrics(3)
    metrics.update(torch.tensor(predicted), torch.tensor(target))
    pairs = list(zip(predicted, target, strict=True))
    hits = [pairs.count((c, c)) for c in range(3)]
    precision = [hits[c] / predicted.count(c) for c in range(3)]
    recall = [hits[c] / target.count(c) for c in range(3)]
    f1 = [2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True)]
    assert {name: float(value) for name, value in metrics.compute().items()} == pytest.approx(
        {"accuracy": 4 / 6, "precision": sum(precision) / 3, "recall": sum(recall) / 3, "f1": sum(f1) / 3}
    )
