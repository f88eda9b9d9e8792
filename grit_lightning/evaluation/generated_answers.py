"""Evaluation by generated answers: which rows, against which references, and a record of every one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import datasets
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from peft import PeftModel
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from grit_lightning.evaluation.choices import IGNORED, left_padded_prompts
from grit_lightning.evaluation.generation import GenerationSettings, Stage, check_context, generate_answers
from grit_lightning.evaluation.text_metrics import Score, TextMetric, text_metrics

Record = dict[str, Score]
"""One row: its number `row`, `prompt`, `output`, `reference`, `finished` (0 or 1: cut off), and its scores."""


@runtime_checkable
class GenerativeTask(Protocol):
    """What a data module needs for evaluation by generated answers; every `TaskDataModule` has it.

    Attributes:
        tokenizer: Turns tokens into texts.
        choices: Closed answers in class order; empty for free answers.
        text_metrics: What answers are scored by, see `text_metrics.text_metrics`.
    """

    tokenizer: PreTrainedTokenizerBase
    choices: Sequence[str]
    text_metrics: Sequence[str]

    def examples(self, split: Literal["train", "validation", "test"]) -> datasets.Dataset:
        """Columns `reference`, `target` and `prompt_length` of a split, in the rows that a batch's `row` counts."""


class GenerationSteps(LightningModule):
    """The generating side of the module. Subclasses set the attributes that are declared here."""

    generation: GenerationSettings | None
    generators: nn.ModuleDict

    def setup(self, stage: str) -> None:
        """Ask the data module, or each task of a mixture, for references and metrics.

        Raises:
            MisconfigurationException: If it does not tell them.
            OSError: The encoder of BERTScore cannot be had.
        """
        kind: Stage = "val" if stage in ("fit", "validate") else "predict" if stage == "predict" else "test"
        if self.generation is None or kind not in self.generation.stages:
            return
        data, device = getattr(self.trainer, "datamodule", None), self.trainer.strategy.root_device
        for name, task in (getattr(data, "tasks", None) or {"": data}).items():
            evaluation = GenerationEvaluation(self.generation, task, kind, device)
            self.generators[f"{kind}/{name}".rstrip("/")] = evaluation

    def generate_records(
        self, model: PeftModel, batch: Mapping[str, Tensor], batch_idx: int, prefix: str
    ) -> list[Record]:
        """Generates answers and logs their scores.

        Args:
            model: The model.
            batch: As for `GenerationEvaluation`.
            batch_idx: Number of the batch in its loader.
            prefix: `val`, `test` or `predict`, for a mixture with `/<task>`; scores are logged under it.

        Returns:
            A record a row that counts, of a mixture with its `task`; none if nothing is to be generated at this stage.
        """
        if prefix not in self.generators:
            return []
        evaluation = self.generators[prefix]
        records = evaluation(model, batch, batch_idx == 0, self.global_rank, self.trainer.world_size)
        stage, _, task = prefix.partition("/")
        for name, path, metric in evaluation.named_results() if stage != "predict" else ():  # type: ignore[operator]
            attribute = f"generators.{prefix}.{path}"
            options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": 1, "add_dataloader_idx": False}
            self.log(f"{prefix}/{name}", metric, metric_attribute=attribute, **options)
        return [{"task": task, **record} if task else record for record in records]


class GenerationEvaluation(nn.Module):
    """Generates answers to the prompts of a split and scores them.

    Args:
        settings: How answers are generated, and for how many rows.
        task: The data module.
        stage: `val` takes the validation split, `test` and `predict` the test split.
        device: Where the encoder of BERTScore runs.

    Raises:
        MisconfigurationException: If the data module does not tell references and metrics.
        OSError: The encoder of BERTScore cannot be had.
        ValueError: The data module names an unknown metric.
    """

    def __init__(self, settings: GenerationSettings, task: Any, stage: Stage, device: torch.device) -> None:
        """Find references and metrics."""
        super().__init__()
        if not isinstance(task, GenerativeTask):
            raise MisconfigurationException(
                f"Generated answers are scored by what the data module tells: expected one with tokenizer, choices, "
                f"text_metrics and examples(split), as TaskDataModule has them, got {type(task).__name__}. Use such a data "
                "module, or set model.generation to null."
            )
        self.settings = settings
        self.tokenizer = task.tokenizer
        self.examples = task.examples("validation" if stage == "val" else "test")
        self.scorers = nn.ModuleDict(text_metrics(task.text_metrics, task.choices, settings, device))
        self._seen = 0

    def forward(
        self, model: PeftModel, batch: Mapping[str, Tensor], first: bool, rank: int, ranks: int
    ) -> list[Record]:
        """Generates, scores and counts.

        Every process generates for as many rows as the others, so that sharded weights are together everywhere; rows that
        only fill up a batch are then forgotten.

        Args:
            model: The model.
            batch: `input_ids`, `attention_mask`, `labels` int64 [B, T] and `row` int64 [B].
            first: Whether this is the first batch of the split.
            rank: This process.
            ranks: Number of processes.

        Returns:
            A record a row, for the rows of the batch that count and are within `max_rows`.

        Raises:
            ValueError: A prompt and its answer do not fit the model's context.
        """
        if first:
            self._seen = 0
            check_context(model, max(self.examples["prompt_length"][:]), self.settings.max_new_tokens)
        size, limit, seen = len(batch["row"]), self.settings.max_rows, self._seen
        self._seen += size
        left = size if limit is None else min(size, max(0, -(-limit // ranks) - seen))
        positions = (seen + torch.arange(left)) * ranks + rank
        rows = batch["row"][:left].cpu()
        counted = (rows >= 0) & (positions < (limit or torch.inf))
        asked = {name: batch[name][:left] for name in ("input_ids", "attention_mask", "labels")}
        answers = self._answers(model, asked, self.settings.seed + seen * ranks + rank)
        records = [record for record, counts in zip(answers, counted.tolist(), strict=True) if counts]
        return self._scored(records, rows[counted].tolist())

    def named_results(self) -> Iterator[tuple[str, str, Metric]]:
        """Yield what to log: the name of the score, the path of its metric below this module, and the metric."""
        for path, metric in self.named_modules():
            if isinstance(metric, Metric):
                yield path.rpartition(".")[2], path, metric

    def _answers(self, model: PeftModel, batch: Mapping[str, Tensor], seed: int) -> list[Record]:
        """Prompt, output and whether it came to its end, a row."""
        if not len(batch["labels"]):
            return []
        start = (batch["labels"] != IGNORED).int().argmax(-1)
        prompts, mask = left_padded_prompts(batch["input_ids"], batch["attention_mask"], start)
        answers = generate_answers(model, self.tokenizer, prompts, mask, self.settings, seed)
        texts = [self.tokenizer.decode(ids[real.bool()]) for ids, real in zip(prompts, mask, strict=True)]
        return [
            {"prompt": prompt, "output": answer.text, "finished": int(answer.finished)}
            for prompt, answer in zip(texts, answers, strict=True)
        ]

    def _scored(self, records: list[Record], rows: list[int]) -> list[Record]:
        """Add number, reference and scores."""
        examples = self.examples.select_columns(["reference", "target"]).select(rows)
        outputs, references = [str(record["output"]) for record in records], list(examples["reference"])
        scorers = [scorer for scorer in self.scorers.values() if isinstance(scorer, TextMetric)]
        scores = [scorer.score(outputs, references, list(examples["target"])) for scorer in scorers]
        result: list[Record] = []
        for index, (row, record, reference) in enumerate(zip(rows, records, references, strict=True)):
            result.append({"row": row, **record, "reference": reference})
            for by_row in scores:
                result[-1] |= by_row[index]
        return result
