"""Scores of generated texts: a value for each row, and its mean over the rows of all processes.

Every metric takes the same three arguments: outputs and references, B texts each, and targets, the B class indices of tasks
with closed answers (−1 for the others). Metrics that are not a mean over rows (BLEU, precision, recall, F1) keep counts.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import torch
from sacrebleu.metrics.bleu import BLEU, MAX_NGRAM_ORDER
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import F1Score, Precision, Recall
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import SacreBLEUScore

from grit_lightning.errors import InvalidValueError
from grit_lightning.evaluation.bertscore import BertScorer
from grit_lightning.evaluation.generation import GenerationSettings

Score = float | int | str | None
ROUGE = ("rouge1", "rouge2", "rougeL")

_FINAL_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")  # openai/grade-school-math, dataset.py
_NUMBER = re.compile(r"(?:(?<!\d)-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


class TextMetric(nn.Module, ABC):
    """One way to score texts. Subclasses register the torchmetrics that hold the result under the names to log."""

    def __init__(self, **metrics: Metric) -> None:
        """Keep the metrics by the name to log them under."""
        super().__init__()
        self.metrics = nn.ModuleDict(metrics)

    @abstractmethod
    def score(
        self, outputs: Sequence[str], references: Sequence[str], targets: Sequence[int]
    ) -> list[dict[str, Score]]:
        """Score rows and add them to the metrics; also called without rows, since all processes must update equally often.

        Returns:
            A dict of scores for each row.
        """

    def _count(self, name: str, *values: Any) -> None:
        """Update a metric on its device."""
        metric = self.metrics[name]
        assert isinstance(metric, Metric)
        metric.update(*(value.to(metric.device) if isinstance(value, Tensor) else value for value in values))

    def _count_means(self, rows: Sequence[Mapping[str, Score]]) -> None:
        for name in self.metrics:
            self._count(name, torch.tensor([float(row[name] or 0) for row in rows], dtype=torch.float32))


class Rouge(TextMetric):
    """ROUGE-1, ROUGE-2, ROUGE-L: F-measures in [0, 1] as rouge_score has them, without stemming."""

    def __init__(self) -> None:
        """Prepare the means."""
        super().__init__(**{name: MeanMetric() for name in ROUGE})

    def score(
        self, outputs: Sequence[str], references: Sequence[str], targets: Sequence[int]
    ) -> list[dict[str, Score]]:
        """Score as in `TextMetric`; keys rouge1, rouge2, rougeL."""
        rows: list[dict[str, Score]] = []
        for output, reference in zip(outputs, references, strict=True):
            scores = rouge_score(output, reference, rouge_keys=ROUGE)
            rows.append({name: float(scores[f"{name}_fmeasure"]) for name in ROUGE})
        self._count_means(rows)
        return rows


class Bleu(TextMetric):
    """Corpus BLEU in [0, 1] with sacreBLEU's defaults: up to 4-grams, tokenizer 13a, exponential smoothing."""

    def __init__(self) -> None:
        """Prepare the counts."""
        super().__init__(bleu=CorpusBLEU())

    def score(
        self, outputs: Sequence[str], references: Sequence[str], targets: Sequence[int]
    ) -> list[dict[str, Score]]:
        """Count as in `TextMetric`; no keys, since BLEU belongs to a corpus and not to a row."""
        self._count("bleu", outputs, [[reference] for reference in references])
        return [{} for _ in outputs]


class CorpusBLEU(SacreBLEUScore):
    """torchmetrics' counts over all ranks with sacreBLEU's own formula.

    torchmetrics does not have its smoothing: without a single matching 4-gram it gives 0.
    """

    def compute(self) -> Tensor:
        """Return BLEU, in [0, 1]."""
        correct, total = ([int(count) for count in counts.tolist()] for counts in (self.numerator, self.denominator))
        lengths = int(self.preds_len), int(self.target_len)
        score = BLEU.compute_bleu(correct, total, *lengths, smooth_method="exp", max_ngram_order=MAX_NGRAM_ORDER).score
        return torch.tensor(score / 100, dtype=torch.float32)


class BertScore(TextMetric):
    """BERTScore precision, recall and F1 (Zhang et al. 2020), not rescaled, without idf weights."""

    def __init__(self, scorer: BertScorer) -> None:
        """Keep the encoder out of the module's own parts: it is neither trained nor saved."""
        super().__init__(**{f"bertscore_{name}": MeanMetric() for name in ("precision", "recall", "f1")})
        self._scorer = scorer

    def score(
        self, outputs: Sequence[str], references: Sequence[str], targets: Sequence[int]
    ) -> list[dict[str, Score]]:
        """Score as in `TextMetric`; keys bertscore_precision, bertscore_recall, bertscore_f1."""
        rows: list[dict[str, Score]] = [
            {f"bertscore_{name}": value for name, value in scores.items()}
            for scores in self._scorer(outputs, references)
        ]
        self._count_means(rows)
        return rows


class FinalNumber(TextMetric):
    """Exact match of the final number, as for GSM8K.

    `exact_match` is the official one: the text after '#### ', without commas, is the same. `exact_match_flexible` is beyond
    the paper, for models that do not write '####': the last number of the output equals the reference's.
    """

    def __init__(self) -> None:
        """Prepare the means."""
        super().__init__(exact_match=MeanMetric(), exact_match_flexible=MeanMetric())

    def score(
        self, outputs: Sequence[str], references: Sequence[str], targets: Sequence[int]
    ) -> list[dict[str, Score]]:
        """Score as in `TextMetric`; also returns `final_answer`, what was found in the output, or None.

        Raises:
            ValueError: If a reference has no final answer.
        """
        rows: list[dict[str, Score]] = []
        for output, reference in zip(outputs, references, strict=True):
            expected, found, last = final_answer(reference), final_answer(output), last_number(output)
            if expected is None:
                raise InvalidValueError(
                    f"Reference: expected one that ends in '#### <number>', got {reference[-60:]!r}. Correct the data, or take "
                    "exact_match out of the data module's text_metrics."
                )
            exact, flexible = found == expected, last is not None and last == last_number(reference)
            rows.append({"exact_match": int(exact), "exact_match_flexible": int(flexible), "final_answer": found})
        self._count_means(rows)
        return rows


class ExactText(TextMetric):
    """Share of outputs that are the reference, but for white space; beyond the paper."""

    def __init__(self) -> None:
        """Prepare the mean."""
        super().__init__(exact_text=MeanMetric())

    def score(
        self, outputs: Sequence[str], references: Sequence[str], targets: Sequence[int]
    ) -> list[dict[str, Score]]:
        """Score as in `TextMetric`; key exact_text, 0 or 1."""
        rows: list[dict[str, Score]] = [
            {"exact_text": int(output.split() == reference.split())}
            for output, reference in zip(outputs, references, strict=True)
        ]
        self._count_means(rows)
        return rows


class AnswerWord(TextMetric):
    """Classification by the answer word in the generated text.

    An output that names no class is wrong: it lowers accuracy and recall, but no class's precision. Of two
    classes, class 1 is the positive one, and there are macro averages beside it; with more, precision, recall and F1 are
    macro averages.

    Args:
        choices: The answers, in class order.
    """

    def __init__(self, choices: Sequence[str]) -> None:
        """Prepare the counts."""
        several: dict[str, Any] = {"task": "multilabel", "num_labels": len(choices), "average": "macro"}
        task: dict[str, Any] = {"task": "binary"} if len(choices) == 2 else several
        averages: dict[str, Metric] = {}
        if len(choices) == 2:
            averages["generated_macro_precision"] = Precision(**several)
            averages["generated_macro_recall"] = Recall(**several)
            averages["generated_macro_f1"] = F1Score(**several)
        super().__init__(
            unmapped=MeanMetric(),
            generated_accuracy=MeanMetric(),
            generated_precision=Precision(**task),
            generated_recall=Recall(**task),
            generated_f1=F1Score(**task),
            **averages,
        )
        self.choices = tuple(choices)

    def score(
        self, outputs: Sequence[str], references: Sequence[str], targets: Sequence[int]
    ) -> list[dict[str, Score]]:
        """Score as in `TextMetric`; keys `answer`, the choice that was named, or None, and `correct`, 0 or 1."""
        found = [answer_class(output, self.choices) for output in outputs]
        predicted, target = torch.tensor(found, dtype=torch.long), torch.tensor(targets, dtype=torch.long)
        self._count("unmapped", (predicted < 0).float())
        self._count("generated_accuracy", (predicted == target).float())
        if found:  # these refuse an empty update
            columns, right = self._one_hot(predicted), self._one_hot(target)
            for average in ("generated_macro_", "generated_") if len(self.choices) == 2 else ("generated_",):
                if average == "generated_" and len(self.choices) == 2:
                    columns, right = columns[:, 1], right[:, 1]  # the positive class alone
                for name in ("precision", "recall", "f1"):
                    self._count(f"{average}{name}", columns, right)
        return [
            {"answer": self.choices[index] if index >= 0 else None, "correct": int(index == right)}
            for index, right in zip(found, targets, strict=True)
        ]

    def _one_hot(self, classes: Tensor) -> Tensor:
        """Return classes `[B]` as one-hot `[B, C]`, no column set for −1."""
        return (classes[:, None] == torch.arange(len(self.choices))).long()


def text_metrics(
    names: Sequence[str], choices: Sequence[str], settings: GenerationSettings, device: torch.device
) -> dict[str, TextMetric]:
    """Make metrics by name, as a data module's `text_metrics` names them.

    Args:
        names: Any of rouge, bleu, bertscore, exact_match, exact_text, classification.
        choices: The closed answers in class order, for classification.
        settings: Says which encoder BERTScore uses.
        device: Where that encoder runs.

    Raises:
        ValueError: If a name is unknown.
        OSError: If the encoder of BERTScore cannot be read; says how to get it and how to leave it out.
    """
    makers: dict[str, Callable[[], TextMetric]] = {
        "rouge": Rouge,
        "bleu": Bleu,
        "bertscore": lambda: BertScore(BertScorer(str(settings.bertscore_encoder), settings.bertscore_layer, device)),
        "exact_match": FinalNumber,
        "exact_text": ExactText,
        "classification": lambda: AnswerWord(choices),
    }
    if unknown := [name for name in names if name not in makers]:
        raise InvalidValueError(f"The data module's text_metrics: expected any of {', '.join(makers)}, got {unknown}.")
    wanted = [name for name in names if name != "bertscore" or settings.bertscore_encoder is not None]
    return {name: makers[name]() for name in wanted}


def final_answer(text: str) -> str | None:
    """Find the final answer of a GSM8K solution, as openai/grade-school-math does: after '#### ', without commas.

    Example:
        >>> final_answer("She pays 2 * 600 = 1200 dollars. #### 1,200")
        '1200'
    """
    match = _FINAL_ANSWER.search(text)
    return match.group(1).strip().replace(",", "") if match else None


def last_number(text: str) -> Decimal | None:
    """Find the last number of a text, without dollar signs and thousands separators; beyond the paper.

    Example:
        >>> last_number("So that is $1,200.50 in 3-4 weeks, or -7."), last_number("nothing")
        (Decimal('-7'), None)
    """
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("$", "")) if numbers else None


def answer_class(text: str, choices: Sequence[str]) -> int:
    """Find the class whose answer comes first among the words of a text, ignoring case; −1 if there is none.

    Where two answers begin at the same word, the longer one counts ("not entailed", "not").

    Example:
        >>> [answer_class(text, ["no", "yes"]) for text in ("Yes, it is.", "The answer is NO", "not yesterday")]
        [1, 0, -1]
    """
    words = _words(text)
    named = [
        (start, -len(choice), index)
        for index, choice in enumerate(map(_words, choices))
        for start in range(len(words))
        if words[start : start + len(choice)] == choice
    ]
    return min(named)[2] if named else -1


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
