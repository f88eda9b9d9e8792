"""Evaluation by generated answers: which rows are asked, what the model answers, and how the answers are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from torch import Tensor, nn
from torchmetrics import Metric

from grit_lightning.batches import last_answer_start, left_padded_prompts
from grit_lightning.evaluation.datamodule_protocols import GenerativeTask, evaluation_key, tasks_of
from grit_lightning.evaluation.generation import (
    GenerationSettings,
    Stage,
    generate_answers,
    require_room_for_answers,
)
from grit_lightning.evaluation.text_metrics import Score, TextMetric, text_metrics

AnsweredRow = dict[str, Score]
"""One row: its number `row`, `prompt`, `output`, `reference`, `finished` (0 if it was cut off, else 1), and its scores."""


class AnswerEvaluations(nn.ModuleDict):
    """The evaluations by generated answers of a module: by stage, and in a mixture by stage and task (`test/boolq`).

    It is a `ModuleDict` because Lightning looks for the metrics that it logs among the submodules of its module.

    Args:
        settings: How answers are generated, and at which stages; None generates none.
    """

    def __init__(self, settings: GenerationSettings | None) -> None:
        """Start without any evaluation."""
        super().__init__()
        self.settings = settings

    def set_up(self, stage: str, datamodule: object, device: torch.device) -> None:
        """Prepare the evaluation of a stage, one for each task of a mixture, where the settings ask for it.

        A task whose rows have no prompts says so (`has_prompts`); nothing is generated for it, with a warning.

        Args:
            stage: The Trainer's: `fit`, `validate`, `test` or `predict`.
            datamodule: Where prompts, references and metrics come from.
            device: Where the encoder of BERTScore runs.

        Raises:
            MisconfigurationException: If the data module has no references or metrics.
            OSError: If the encoder of BERTScore cannot be read.
        """
        kind: Stage = "val" if stage in ("fit", "validate") else "predict" if stage == "predict" else "test"
        if self.settings is None or kind not in self.settings.stages:
            return
        for name, task in tasks_of(datamodule).items():
            if not getattr(task, "has_prompts", True):
                rank_zero_warn(
                    f"model.generation: the rows of {type(task).__name__} have no prompts to answer. Nothing is generated."
                )
                continue
            self[evaluation_key(kind, name)] = AnswerEvaluation(self.settings, task, kind, device)

    def answer(
        self, key: str, model: PeftModel, batch: Mapping[str, Tensor], *, first: bool, rank: int, ranks: int
    ) -> list[AnsweredRow]:
        """Generate answers to a batch and score them.

        Args:
            key: `val`, `test` or `predict`, in a mixture with `/<task>`.
            model: As for `AnswerEvaluation`, as are the other arguments.
            batch: `input_ids`, `attention_mask`, `labels` int64 `[B, T]` and `row` int64 `[B]`.
            first: Whether this is the first batch of the split.
            rank: Rank of this process.
            ranks: Number of processes.

        Returns:
            The rows that count, in a mixture each with its `task`; empty if nothing should be generated under this key.
        """
        if key not in self:
            return []
        rows: list[AnsweredRow] = self[key](model, batch, first, rank, ranks)
        task = key.partition("/")[2]
        return [{"task": task, **row} if task else row for row in rows]

    def log_scores(self, key: str, log: Callable[..., None], attribute: str) -> None:
        """Log the scores so far of the answers under a key, except for predictions.

        Args:
            key: As for `answer`.
            log: The module's `log`.
            attribute: Name under which the module holds this object. Lightning would find the metrics by itself, but not
                again after a failed evaluation.
        """
        if key not in self or key.partition("/")[0] == "predict":
            return
        evaluation = self[key]
        assert isinstance(evaluation, AnswerEvaluation)
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": 1, "add_dataloader_idx": False}
        for path, metric in evaluation.named_metrics():
            name = path.rpartition(".")[2]
            log(f"{key}/{name}", metric, metric_attribute=f"{attribute}.{key}.{path}", **options)


class AnswerEvaluation(nn.Module):
    """Generates answers to the prompts of a split and scores them.

    Args:
        settings: How answers are generated, and for how many rows.
        task: The data module.
        stage: `val` uses the validation split, `test` and `predict` the test split.
        device: Where the encoder of BERTScore runs.

    Raises:
        MisconfigurationException: If the data module has no references or metrics.
        OSError: If the encoder of BERTScore cannot be read.
        ValueError: If the data module names an unknown metric.
    """

    def __init__(self, settings: GenerationSettings, task: object, stage: Stage, device: torch.device) -> None:
        """Find references and metrics."""
        super().__init__()
        if not isinstance(task, GenerativeTask):
            raise MisconfigurationException(
                "model.generation: expected a data module with tokenizer, choices, text_metrics and examples(split), like "
                f"TaskDataModule, to score generated answers, got {type(task).__name__}. Use such a data module, or set "
                "model.generation to null."
            )
        self.settings = settings
        self.tokenizer = task.tokenizer
        self.stop_ids: list[int] = list(getattr(task, "stop_ids", ()))  # a task need not know any
        self.examples = task.examples("validation" if stage == "val" else "test")
        self.scorers = nn.ModuleDict(text_metrics(task.text_metrics, task.choices, settings, device))
        self._seen = 0

    def forward(
        self, model: PeftModel, batch: Mapping[str, Tensor], first: bool, rank: int, ranks: int
    ) -> list[AnsweredRow]:
        """Generate answers, score them, and add the scores to the metrics.

        Every process generates for the same number of rows, since sharded weights are gathered on all processes at once;
        rows that only fill up a batch are dropped afterwards.

        Args:
            model: The model.
            batch: `input_ids`, `attention_mask`, `labels` int64 `[B, T]` and `row` int64 `[B]`.
            first: Whether this is the first batch of the split.
            rank: Rank of this process.
            ranks: Number of processes.

        Returns:
            The rows of the batch that count and are within `max_rows`.

        Raises:
            ValueError: If a prompt and its answer do not fit the model's context.
        """
        if first:
            self._seen = 0
            require_room_for_answers(model, max(self.examples["prompt_length"][:]), self.settings.max_new_tokens)
        size, limit, seen = len(batch["row"]), self.settings.max_rows, self._seen
        self._seen += size
        left = size if limit is None else min(size, max(0, -(-limit // ranks) - seen))
        positions = (seen + torch.arange(left)) * ranks + rank
        rows = batch["row"][:left].cpu()
        counted = (rows >= 0) & (positions < (limit or torch.inf))
        asked = {name: batch[name][:left] for name in ("input_ids", "attention_mask", "labels")}
        answers = self._answers(model, asked, self.settings.seed + seen * ranks + rank)
        kept = [answer for answer, counts in zip(answers, counted.tolist(), strict=True) if counts]
        return self._scored(kept, rows[counted].tolist())

    def named_metrics(self) -> Iterator[tuple[str, Metric]]:
        """Yield the metrics with their paths below this module; a path ends in the name to log under."""
        for path, module in self.named_modules():
            if isinstance(module, Metric):
                yield path, module

    def _answers(self, model: PeftModel, batch: Mapping[str, Tensor], seed: int) -> list[AnsweredRow]:
        """Return `prompt`, `output` and `finished` of each row."""
        if not len(batch["labels"]):
            return []
        start = last_answer_start(batch["labels"])  # of a conversation, the last turn is generated
        prompts, mask = left_padded_prompts(batch["input_ids"], batch["attention_mask"], start)
        answers = generate_answers(model, self.tokenizer, prompts, mask, self.settings, seed, self.stop_ids)
        texts = [self.tokenizer.decode(ids[real.bool()]) for ids, real in zip(prompts, mask, strict=True)]
        return [
            {"prompt": prompt, "output": answer.text, "finished": int(answer.finished)}
            for prompt, answer in zip(texts, answers, strict=True)
        ]

    def _scored(self, answers: list[AnsweredRow], rows: list[int]) -> list[AnsweredRow]:
        """Add number, reference and scores to each row."""
        examples = self.examples.select_columns(["reference", "target"]).select(rows)
        outputs, references = [str(answer["output"]) for answer in answers], list(examples["reference"])
        scorers = [scorer for scorer in self.scorers.values() if isinstance(scorer, TextMetric)]
        scores = [scorer.score(outputs, references, list(examples["target"])) for scorer in scorers]
        answered: list[AnsweredRow] = []
        for index, (row, answer, reference) in enumerate(zip(rows, answers, references, strict=True)):
            answered.append({"row": row, **answer, "reference": reference})
            for by_row in scores:
                answered[-1] |= by_row[index]
        return answered
