"""Scores of texts against the packages that define them: rouge_score, sacrebleu, GSM8K's own extraction, BERTScore by hand."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import processors
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from grit_lightning.evaluation.bertscore import BertScorer
from grit_lightning.evaluation.generation import GenerationSettings
from grit_lightning.evaluation.text_metrics import (
    AnswerWord,
    TextMetric,
    answer_class,
    final_answer,
    last_number,
    text_metrics,
)

FLOAT32 = 1e-6
"""Scores and means are float32."""

TEXT = """the cat sat on a mat while 1,200 dogs ran; don't stop at 3.50 dollars (ever) e-mail naïve Straße 東京 &amp; x²
U.S. #### 42 No. yes, "quoted" it's -7 100% A.B.C. well-known -- ... ? ! the the cat"""
WORDS = [*TEXT.split(), "", "\n\n"]


def made_texts(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Outputs and references that share many words; some are empty, some equal."""
    draw = random.Random(seed)
    references = [" ".join(draw.choices(WORDS, k=draw.randint(0, 40))) for _ in range(count)]
    outputs = []
    for reference in references:
        words = reference.split(" ")
        kept = [word if draw.random() < 0.7 else draw.choice(WORDS) for word in words]
        outputs.append(" ".join(kept[: draw.randint(0, len(kept) + 1)]))
    return outputs, references


def real_texts(count: int) -> tuple[list[str], list[str]]:
    """Answers of GSM8K against those of the questions before them."""
    roots = [Path(root) for root in [os.environ.get("GRIT_TEST_DATA")] if root]
    roots += [parent / "shared" / "data" for parent in Path(__file__).resolve().parents]
    file = next((root / "gsm8k" / "test.jsonl" for root in roots if (root / "gsm8k" / "test.jsonl").is_file()), None)
    if file is None:
        pytest.skip("needs GSM8K's test.jsonl under $GRIT_TEST_DATA or a folder shared/data beside the checkout")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[: count + 1]]
    answers = [row["answer"] for row in rows]
    return answers[:-1], answers[1:]


@pytest.fixture(params=["made", "real"])
def texts(request: pytest.FixtureRequest) -> tuple[list[str], list[str]]:
    return made_texts(300) if request.param == "made" else real_texts(200)


def make(name: str, choices: Sequence[str] = (), **settings: Any) -> TextMetric:
    made = text_metrics([name], choices, GenerationSettings(**settings), torch.device("cpu"))
    return made[name]


def results(metric: TextMetric) -> dict[str, float]:
    return {name: float(value.compute()) for name, value in metric.metrics.items()}  # type: ignore[operator]


def scored_in_parts(metric: TextMetric, *columns: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows scored as batches of seven, with an empty one between."""
    rows = metric.score([], [], [])
    assert rows == []
    for first in range(0, len(columns[0]), 7):
        rows += metric.score(*(list(column[first : first + 7]) for column in columns))
    return rows


def test_rouge_equals_rouge_score(texts: tuple[list[str], list[str]]) -> None:
    outputs, references = texts
    metric = make("rouge")
    rows = scored_in_parts(metric, outputs, references, [-1] * len(outputs))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    expected = [
        {name: score.fmeasure for name, score in scorer.score(target=reference, prediction=output).items()}
        for output, reference in zip(outputs, references, strict=True)
    ]
    for row, right in zip(rows, expected, strict=True):
        assert row == pytest.approx(right, abs=FLOAT32)
    means = {name: sum(row[name] for row in expected) / len(expected) for name in expected[0]}
    assert results(metric) == pytest.approx(means, abs=FLOAT32)


def test_bleu_equals_sacrebleu(texts: tuple[list[str], list[str]]) -> None:
    outputs, references = texts
    metric = make("bleu")
    scored_in_parts(metric, outputs, references, [-1] * len(outputs))
    expected = sacrebleu.corpus_bleu(outputs, [references]).score / 100
    assert expected > 0.01
    assert results(metric)["bleu"] == pytest.approx(expected, abs=FLOAT32)


@pytest.mark.parametrize(
    ("outputs", "references"),
    [
        (["the cat sat"], ["the cat sat on it"]),
        (["a b c d x y", "b"], ["a b c q w e", "b"]),
        (["nothing alike"], ["quite other words"]),
        (["", "the cat sat on the mat"], ["words", "the cat sat on a mat"]),
        ([""], [""]),
    ],
    ids=["no 4-gram", "no matching 4-gram", "no match", "an empty output", "all empty"],
)
def test_bleu_of_degenerate_corpora_is_smoothed_as_in_sacrebleu(outputs: list[str], references: list[str]) -> None:
    metric = make("bleu")
    scored_in_parts(metric, outputs, references, [-1] * len(outputs))
    assert results(metric)["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(outputs, [references]).score / 100, abs=FLOAT32
    )


def official_extraction(completion: str) -> str:
    """The code of openai/grade-school-math, dataset.py."""
    match = re.compile(r"#### (\-?[0-9\.\,]+)").search(completion)
    if match:
        match_str = match.group(1).strip()
        match_str = match_str.replace(",", "")
        return match_str
    return "[invalid]"


def test_exact_match_is_the_official_one(texts: tuple[list[str], list[str]]) -> None:
    draw = random.Random(1)
    references = [f"{text.replace('####', '')} #### {draw.choice(['1,234', '-7', '42', '3.5'])}" for text in texts[1]]
    chains = [text.replace("####", "") for text in texts[0]]
    outputs = [
        f"{chain} {draw.choice(['#### 1234', '#### -7', '#### 42.', '####42', '#### $42', '42'])}" for chain in chains
    ]
    metric = make("exact_match")
    rows = scored_in_parts(metric, outputs, references, [-1] * len(outputs))
    expected = [official_extraction(o) == official_extraction(r) for o, r in zip(outputs, references, strict=True)]
    assert [row["exact_match"] for row in rows] == expected
    assert 0 < sum(expected) < len(expected)
    assert [row["final_answer"] or "[invalid]" for row in rows] == [official_extraction(output) for output in outputs]
    assert results(metric)["exact_match"] == pytest.approx(sum(expected) / len(expected), abs=FLOAT32)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 3 + 4 = 7.", "7"),
        ("It costs $1,234.50!", "1234.50"),
        ("pages 10-12", "12"),
        ("minus is -12", "-12"),
        ("3 apples, 2 pears and .5 kg", ".5"),
        ("#### 18\n\nQuestion: none", "18"),
        ("1,2 and 3,4", "4"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_flexible_match_takes_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))
    row = make("exact_match").score([text], [f"chain #### {number or 5}"], [-1])[0]
    assert row["exact_match_flexible"] == (number is not None)


def test_a_reference_without_a_final_answer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ends in '#### <number>', got 'about seven'"):
        make("exact_match").score(["#### 7"], ["about seven"], [-1])


def test_an_output_means_the_first_answer_among_its_words() -> None:
    choices = ["no", "yes", "not sure", "not"]
    cases = {"Yes.": 1, "I say: NO, yes": 0, "not sure": 2, "not yes": 3, "notes yesterday": -1, "": -1, "a (yes)": 1}
    assert {text: answer_class(text, choices) for text in cases} == cases


def test_always_the_same_answer_is_seen_in_the_macro_average() -> None:
    metric = make("classification", ["no", "yes"])
    scored_in_parts(metric, ["yes"] * 4, [""] * 4, [1, 1, 1, 0])
    found = results(metric)
    assert found["generated_recall"] == 1.0
    assert found["generated_macro_recall"] == pytest.approx(1 / 2)


def test_classification_counts_unmapped_outputs_as_wrong_and_as_no_class() -> None:
    outputs = ["yes", "Yes!", "no", "maybe", "maybe", "no", "yes", "no"]
    targets = [1, 0, 0, 1, 0, 1, 1, 0]  # by hand: TP 2, FP 1, FN 2 (one unmapped), right 4 of 8, unmapped 2
    metric = make("classification", ["no", "yes"])
    rows = scored_in_parts(metric, outputs, [""] * 8, targets)
    precision, recall = 2 / 3, 2 / 4
    assert results(metric) == pytest.approx(
        {
            "unmapped": 2 / 8,
            "generated_accuracy": 4 / 8,
            "generated_precision": precision,
            "generated_recall": recall,
            "generated_f1": 2 * precision * recall / (precision + recall),
            "generated_macro_precision": (2 / 3 + precision) / 2,  # class 0: TP 2, FP 1, FN 2
            "generated_macro_recall": (2 / 4 + recall) / 2,
            "generated_macro_f1": (4 / 7 + 4 / 7) / 2,
        }
    )
    assert rows[3] == {"answer": None, "correct": 0}
    assert sum(row["correct"] for row in rows) == 4


def test_classification_into_more_classes_averages_them() -> None:
    choices, draw = ["red", "green", "blue"], random.Random(0)
    targets = [draw.randrange(3) for _ in range(60)]
    outputs = [draw.choice([choices[target], *choices, "none"]) for target in targets]
    metric = AnswerWord(choices)
    scored_in_parts(metric, outputs, [""] * 60, targets)
    pairs = [(choices.index(o) if o in choices else None, t) for o, t in zip(outputs, targets, strict=True)]
    precision = [pairs.count((c, c)) / sum(p == c for p, _ in pairs) for c in range(3)]
    recall = [pairs.count((c, c)) / sum(t == c for _, t in pairs) for c in range(3)]
    f1 = [2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True)]
    found = results(metric)
    assert found["generated_accuracy"] == pytest.approx(sum(p == t for p, t in pairs) / 60)
    assert found["generated_precision"] == pytest.approx(sum(precision) / 3)
    assert found["generated_recall"] == pytest.approx(sum(recall) / 3)
    assert found["generated_f1"] == pytest.approx(sum(f1) / 3)


@pytest.fixture
def encoder_dir(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny BERT of three layers that reads bytes, with a start and an end token."""
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=320, max_position_embeddings=128, initializer_range=0.5, **config)).save_pretrained(
        tmp_path
    )
    special = [("<s>", 1), ("</s>", 2)]
    tiny_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=special
    )
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def bert_score_by_hand(model: nn.Module, tokenizer: Any, output: str, reference: str, layer: int) -> list[float]:
    """Zhang et al. 2020, equations 1 to 3, of one pair: no batch, no padding."""

    def embedded(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=128).input_ids])
        hidden = model(ids, output_hidden_states=True).hidden_states[layer][0, 1:-1]
        return hidden / hidden.norm(dim=-1, keepdim=True)

    with torch.no_grad():
        similarity = embedded(output) @ embedded(reference).T
    precision, recall = similarity.max(1).values.mean().item(), similarity.max(0).values.mean().item()
    return [precision, recall, 2 * precision * recall / (precision + recall)]


def test_bertscore_equals_the_paper_row_by_row(encoder_dir: Path, tiny_tokenizer: Any) -> None:
    outputs = ["a longer text than the others", "short", "medium size", "x" * 300]
    references = ["tiny", "something else that is quite long", "m s", "y" * 300]
    metric = make("bertscore", bertscore_encoder=str(encoder_dir), bertscore_layer=2)
    rows = scored_in_parts(metric, outputs, references, [-1] * 4)
    model = BertModel.from_pretrained(encoder_dir).eval()
    names = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
    expected = [bert_score_by_hand(model, tiny_tokenizer, o, r, 2) for o, r in zip(outputs, references, strict=True)]
    for row, right in zip(rows, expected, strict=True):
        assert row == pytest.approx(dict(zip(names, right, strict=True)), abs=1e-5)
    means = [sum(column) / 4 for column in zip(*expected, strict=True)]
    assert results(metric) == pytest.approx(dict(zip(names, means, strict=True)), abs=1e-5)
    assert list(metric.parameters()) == []


def test_bertscore_of_an_empty_text_is_zero_and_scoring_draws_nothing(encoder_dir: Path) -> None:
    scorer = BertScorer(str(encoder_dir), 1, torch.device("cpu"))
    zero = {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    before = torch.get_rng_state()
    assert scorer(["", "text", ""], ["text", "", ""]) == [zero, zero, zero]
    assert torch.equal(torch.get_rng_state(), before)


def test_an_encoder_that_cannot_be_had_says_what_to_download_and_what_to_set() -> None:
    with pytest.raises(OSError, match=r"(?s)hf download some/encoder --local-dir encoder.*bertscore_encoder.*null"):
        make("bertscore", bertscore_encoder="some/encoder")


def test_a_layer_that_the_encoder_does_not_have_is_refused(encoder_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"bertscore_layer: expected at most 3, .*got 17"):
        make("bertscore", bertscore_encoder=str(encoder_dir))


def test_without_an_encoder_bertscore_is_left_out() -> None:
    made = text_metrics(["rouge", "bertscore"], [], GenerationSettings(bertscore_encoder=None), torch.device("cpu"))
    assert list(made) == ["rouge"]


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"text_metrics: expected any of rouge, .*, exact_match, exact_text, classification, got \['meteor'\]",
    ):
        text_metrics(["meteor"], [], GenerationSettings(), torch.device("cpu"))


def test_rouge_needs_no_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sentence splitter would be downloaded at run time; the three that are offered do not split sentences."""
    import builtins

    original: Callable[..., Any] = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        assert not name.startswith("nltk"), "nltk was imported"
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    make("rouge").score(["One sentence. Another."], ["One sentence."], [-1])


def test_final_answers_keep_what_the_official_extraction_keeps() -> None:
    assert final_answer("#### 1,000.") == "1000."
    assert final_answer("####5") is None
