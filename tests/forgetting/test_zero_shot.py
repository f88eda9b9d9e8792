"""Zero-shot accuracies: against one row at a time, against lm-evaluation-harness, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grit_lightning.forgetting import ZeroShotTask
from grit_lightning.forgetting.choices import SCHEMAS, Question
from grit_lightning.forgetting.likelihood import log_likelihoods
from grit_lightning.forgetting.zero_shot import ChoiceQuestions, sequence_of

from .conftest import ARC_ROWS, HELLASWAG_ROWS, WINOGRANDE_ROWS

ROWS = {"arc_easy": ARC_ROWS, "arc_challenge": ARC_ROWS, "hellaswag": HELLASWAG_ROWS, "winogrande": WINOGRANDE_ROWS}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[dict[str, Any]]], str]:
    def to_file(rows: list[dict[str, Any]]) -> str:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    return to_file


@pytest.fixture
def model(make_tiny_llama: Callable[..., Any]) -> nn.Module:
    """A float64 Llama whose likelihoods differ enough that right and wrong are both common."""
    return make_tiny_llama(initializer_range=0.2).double().eval()


def score(model: nn.Module, questions: ChoiceQuestions, batch_size: int = 3) -> Tensor:
    def logits_of(batch: dict[str, Tensor]) -> Tensor:
        return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    return log_likelihoods(logits_of, questions.sequences, batch_size, torch.device("cpu"))


@torch.no_grad()
def reference(model: nn.Module, tokenizer: Any, context: str, continuation: str) -> float:
    """Log-likelihood of the continuation, one row, from the tokens of the whole text (one a byte)."""
    ids = tokenizer(context + continuation, add_special_tokens=False).input_ids
    log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(context.rstrip().encode())
    return sum(float(log_probabilities[i - 1, ids[i]]) for i in range(start, len(ids)))


@pytest.mark.parametrize("schema", ROWS)
def test_accuracies_are_those_of_single_rows(
    schema: str, write: Callable[..., str], model: nn.Module, tiny_tokenizer: Any
) -> None:
    questions = ZeroShotTask(schema, write(ROWS[schema])).read(tiny_tokenizer)
    scores = score(model, questions)
    values = questions.values(scores)
    assert tuple(values) == (("acc",) if schema == "winogrande" else ("acc", "acc_norm"))
    lines = questions.describe(scores)
    for index, question in enumerate(questions.questions):
        expected = [reference(model, tiny_tokenizer, *pair) for pair in question.pairs]
        assert lines[index]["log_likelihoods"] == pytest.approx(expected, abs=1e-9)
        assert values["acc"][index] == (expected.index(max(expected)) == question.answer)
        if "acc_norm" in values:
            per_character = [e / len(c[1:]) for e, (_, c) in zip(expected, question.pairs, strict=True)]
            assert values["acc_norm"][index] == (per_character.index(max(per_character)) == question.answer)
    assert questions.weights.sum() == len(ROWS[schema])


def test_acc_norm_divides_by_characters() -> None:
    question = Question([("Q", " aé"), ("Q", " aaaa")], [2, 4], 1)  # two characters in three bytes, four in four
    questions = ChoiceQuestions("q", [], [question], SCHEMAS["arc_easy"])
    scores = torch.tensor([-6.0, -10.0], dtype=torch.float64)
    assert {metric: value.tolist() for metric, value in questions.values(scores).items()} == {
        "acc": [0.0],
        "acc_norm": [1.0],
    }
    # −6 / 3 bytes would beat −10 / 4 bytes, −6 / 2 characters does not


def test_the_harness_gets_the_same_numbers(
    write: Callable[..., str], make_tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model = make_tiny_llama(initializer_range=0.2).eval()
    rows = write(ARC_ROWS)
    task = ConfigurableTask(
        config={
            "task": "arc",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": rows}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{choices.label.index(answerKey)}}",
            "doc_to_choice": "{{choices.text}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )
    harness = HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=2)
    found = evaluate(harness, {"arc": task}, bootstrap_iters=0)
    questions = ZeroShotTask("arc_easy", rows).read(tiny_tokenizer)
    scores = score(model, questions)
    theirs = [float(response[0][0]) for sample in found["samples"]["arc"] for response in sample["resps"]]
    torch.testing.assert_close(scores, torch.tensor(theirs), atol=1e-3, rtol=0)  # both in float32
    values = questions.values(scores)
    assert float(values["acc"].mean()) == pytest.approx(found["results"]["arc"]["acc,none"])
    assert float(values["acc_norm"].mean()) == pytest.approx(found["results"]["arc"]["acc_norm,none"])


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(tiny_tokenizer: Any) -> None:
    sequence = sequence_of(tiny_tokenizer, "ab ", " cd")
    assert tiny_tokenizer.decode(sequence.ids) == "ab  cd"
    assert tiny_tokenizer.decode(sequence.ids[sequence.start :]) == "  cd"


def test_limits_count_usable_questions_and_what_is_left_out_is_said(
    write: Callable[..., str], tiny_tokenizer: Any
) -> None:
    source = write([ARC_ROWS[0] | {"answerKey": "9"}, *ARC_ROWS])
    with pytest.warns(
        UserWarning, match=r"rows left out: 1, the first for its answer: expected one of \[.*\], got '9'"
    ):
        questions = ZeroShotTask("arc_easy", source, limit=2).read(tiny_tokenizer)
    assert len(questions.questions) == 2
    with pytest.warns(UserWarning, match="left out: 1"):
        assert len(ZeroShotTask("arc_easy", source, limit=None).read(tiny_tokenizer, 3).questions) == 3


def test_csv_files_with_and_without_a_header(tmp_path: Path, tiny_tokenizer: Any) -> None:
    cells = [["Is ice, as such, cold?", "yes", "no", "maybe", "", "A"], ["Q", "a", "b", "c", "d", "D"], ["R", "a"]]
    for header in ([], [["question", "A", "B", "C", "D", "answerKey"]]):
        file = tmp_path / f"arc{len(header)}.csv"
        with file.open("w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([*header, *(cells if not header else cells[:2])])
        questions = ZeroShotTask("arc_challenge", str(file), limit=2).read(tiny_tokenizer)
        assert [(len(question.pairs), question.answer) for question in questions.questions] == [(3, 0), (4, 3)]
        assert questions.questions[0].pairs[0] == ("Question: Is ice, as such, cold?\nAnswer:", " yes")


@pytest.mark.filterwarnings("ignore:Zero-shot arc_.* rows left out")  # some have no options
@pytest.mark.parametrize("level", ["easy", "challenge"])
def test_real_arc_files_are_read(level: str, real_data: Path, tiny_tokenizer: Any) -> None:
    questions = ZeroShotTask(f"arc_{level}", str(real_data / "arc" / f"arc_{level}_dev.csv"), limit=20).read(
        tiny_tokenizer
    )
    assert len(questions.questions) == 20


@pytest.mark.parametrize(
    ("settings", "rows", "error", "message"),
    [
        ({"schema": "hellaswag"}, ARC_ROWS, ValueError, r"expected the columns \['activity_label'.*got \['question'"),
        (
            {"schema": "winogrande"},
            [WINOGRANDE_ROWS[0] | {"answer": ""}],
            ValueError,
            "expected usable questions, got none, rows left out: 1, the first for its answer",
        ),
        ({"schema": "winogrande", "source": None}, [], ConnectionError, "Could not get allenai/winogrande"),
        ({"schema": "arc_easy", "source": "nosuch.csv"}, [], FileNotFoundError, "does not exist"),
    ],
)
def test_what_cannot_be_asked_is_named(
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    error: type[Exception],
    message: str,
    write: Callable[..., str],
    tiny_tokenizer: Any,
) -> None:
    with pytest.raises(error, match=message):
        ZeroShotTask(**({"source": write(rows)} | settings)).read(tiny_tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schema": "mmlu"}, "schema: expected one of arc_easy, .*, got 'mmlu'"),
        ({"schema": "hellaswag", "limit": 0}, "limit"),
    ],
)
def test_unknown_schemas_and_empty_limits_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZeroShotTask(**settings)
