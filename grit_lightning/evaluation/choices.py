"""Scores of closed answers: the log-likelihood that a causal language model gives each choice.

Shapes: B rows, T tokens, V vocabulary, C choices, K tokens of the longest choice. Padding may be on either side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import Accuracy, F1Score, Precision, Recall

from grit_lightning.backbones.inputs import accepted_arguments
from grit_lightning.batches import IGNORED, answer_start, left_padded_prompts, position_ids
from grit_lightning.errors import InvalidValueError


@torch.no_grad()
def choice_scores(model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """Score every answer choice of every row.

    Choices of one token are read off the logits that the loss was computed from, at the position before the first
    label. Longer ones take a forward pass each, over prompt and choice, and their log-likelihood is divided by their
    number of tokens, as in lm-evaluation-harness's length-normalised accuracy (but by tokens, not by bytes).

    Args:
        model: Causal language model; if K > 1 called with input_ids, attention_mask and position_ids if it takes them.
        batch: `input_ids`, `attention_mask`, `labels` int64 `[B, T]` and `choice_ids` int64 `[B, C, K]`, padded with −100.
        logits: `[B, T', V]`, the model's output for the last T' ≤ T positions of this batch.

    Returns:
        float32 `[B, C]`: log-likelihood per token; −∞ for a choice without tokens. The prediction is the argmax.

    Raises:
        ValueError: If a row has no label, or starts with one, so that there is no prompt to answer.
    """
    choice_ids = batch["choice_ids"]
    start = answer_start(batch["labels"])
    rows = torch.arange(len(start), device=start.device)
    answerable = (batch["labels"] != IGNORED).any(-1) & (start > 0) & (batch["attention_mask"][rows, start - 1] > 0)
    if not answerable.all():
        raise InvalidValueError(
            "Closed answers: expected a prompt followed by labels in every row, got "
            f"{int((~answerable).sum())} of {len(rows)} rows without. Look at the data, or raise data.max_length."
        )
    if choice_ids.shape[-1] == 1:
        skipped = batch["labels"].shape[1] - logits.shape[1]
        log_probabilities = logits[rows, start - 1 - skipped].float().log_softmax(-1)[:, None, None]
        return _per_token(log_probabilities.expand(-1, choice_ids.shape[1], -1, -1), choice_ids)
    prompts, mask = left_padded_prompts(batch["input_ids"], batch["attention_mask"], start)
    return torch.stack([_continuation_scores(model, prompts, mask, ids) for ids in choice_ids.unbind(1)], dim=1)


def classification_metrics(classes: int) -> MetricCollection:
    """Make accuracy, precision, recall and F1, under the keys accuracy, precision, recall, f1.

    Update with predicted classes int64 `[B]` and targets int64 `[B]`. Of two classes, class 1 is the positive one, and the
    macro averages, which treat both alike, are macro_precision, macro_recall and macro_f1; papers report either. With more,
    precision, recall and F1 are macro averages. Accuracy counts rows.

    Args:
        classes: Number of classes.
    """
    macro: dict[str, Any] = {"task": "multiclass", "num_classes": classes, "average": "macro"}
    averages = {"precision": Precision(**macro), "recall": Recall(**macro), "f1": F1Score(**macro)}
    if classes != 2:
        accuracy = Accuracy(task="multiclass", num_classes=classes, average="micro")
        return MetricCollection({"accuracy": accuracy, **averages})
    positive = {"precision": Precision("binary"), "recall": Recall("binary"), "f1": F1Score("binary")}
    return MetricCollection(
        {"accuracy": Accuracy("binary"), **positive, **{f"macro_{name}": metric for name, metric in averages.items()}}
    )


def _per_token(log_probabilities: Tensor, token_ids: Tensor) -> Tensor:
    """Return the mean log-probability `[...]` of tokens `[..., K]` under `[..., K, V]`; ids of −100 do not count."""
    real = token_ids != IGNORED
    picked = log_probabilities.gather(-1, token_ids.clamp(min=0)[..., None]).squeeze(-1)
    mean = picked.masked_fill(~real, 0.0).sum(-1) / real.sum(-1).clamp(min=1)
    return mean.masked_fill(~real.any(-1), -torch.inf)


def _continuation_scores(model: nn.Module, prompts: Tensor, mask: Tensor, choice: Tensor) -> Tensor:
    """Return the log-likelihood per token `[B]` of a choice `[B, K]` after left-padded prompts `[B, P]`."""
    inputs = {
        "input_ids": torch.cat([prompts, choice.clamp(min=0)], dim=1),
        "attention_mask": torch.cat([mask, (choice != IGNORED).to(mask)], dim=1),
    }
    if "position_ids" in accepted_arguments(model):
        inputs["position_ids"] = position_ids(inputs["attention_mask"])
    logits = model(**inputs).logits
    return _per_token(logits[:, prompts.shape[1] - 1 : -1].float().log_softmax(-1), choice)
