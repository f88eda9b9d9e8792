"""Evaluation by generated answers: every row once, on one process or two, with scores that its rows add up to.

Also: limits, mixtures, closed answers scored both ways, and that neither training nor earlier files are touched.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import sacrebleu
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from grit_lightning import GenerationSettings, GritLitModule
from grit_lightning.callbacks import GenerationWriter
from grit_lightning.datamodules import BoolQDataModule, MixtureDataModule, TaskDataModule
from grit_lightning.evaluation.generated_answers import AnsweredRow, AnswerEvaluation
from grit_lightning.evaluation.generation import Answer, generate_answers

ROWS = 7
FEW = GenerationSettings(max_new_tokens=6)


class Sums(TaskDataModule):
    """A free-answer task in the manner of GSM8K."""

    hub_id = "none"
    schema = ("question", "answer")
    text_metrics = ("exact_match", "rouge", "bleu")

    def answer(self, row: Mapping[str, Any]) -> str:
        return str(row["answer"])


def pretended_answers(examples: datasets.Dataset) -> Callable[..., list[AnsweredRow]]:
    """Stand in for a model that can do something: it is right about even rows and echoes the prompt of odd ones."""
    known = {tuple(row["input_ids"]): (index, row["reference"]) for index, row in enumerate(examples)}

    def answers(self: Any, model: Any, batch: Mapping[str, torch.Tensor], seed: int) -> list[AnsweredRow]:
        found = [
            known[tuple(ids[mask.bool()].tolist())]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        return [{"prompt": "", "output": text if row % 2 == 0 else "of 1 and 1", "finished": 1} for row, text in found]

    return answers


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture
def sums(tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., Sums]:
    """A factory of data modules with seven rows in each split."""
    (tmp_path / "sums.yaml").write_text('prompt: "{question}\\nA:"\n')
    rows = [{"question": f"{n} + {'1' * n}1?", "answer": f"sum of {n} and {n} #### {n}"} for n in range(ROWS)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**overrides: Any) -> Sums:
        settings = {
            "batch_size": 2,
            "max_length": 100,
            "source": str(tmp_path),
            "template": str(tmp_path / "sums.yaml"),
        }
        return Sums(tiny_tokenizer, **(settings | overrides))

    return make


@pytest.fixture
def boolq(tiny_tokenizer: Any, tmp_path: Path) -> BoolQDataModule:
    rows = [{"question": f"is {n} even", "passage": f"It is {n}.", "answer": n % 2 == 0} for n in range(6)]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return BoolQDataModule(tiny_tokenizer, source=str(tmp_path / "dev.jsonl"), max_length=100, batch_size=4)


@pytest.fixture
def module(make_tiny_llama: Any, lora_config: Any) -> Callable[..., GritLitModule]:
    """A factory of modules over the same float64 weights."""

    def make(generation: GenerationSettings | None = FEW) -> GritLitModule:
        torch.manual_seed(0)
        return GritLitModule(make_tiny_llama().double(), lora_config(), generation=generation)

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def make(folder: str = "run", **settings: Any) -> pl.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        writer = GenerationWriter(str(tmp_path / folder))
        settings = {"accelerator": "cpu", "devices": 1, "logger": False, **quiet, "callbacks": [writer]} | settings
        return pl.Trainer(**settings)

    return make


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_the_file_holds_every_row_once_with_what_the_model_says_to_it_alone(
    sums: Any, module: Any, make_trainer: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    data, lit = sums(padding_side="left"), module()
    make_trainer().test(lit, data, verbose=False)
    answered, examples = read(tmp_path / "run" / "generations-test.jsonl"), data.examples("test")
    assert [row["row"] for row in answered] == list(range(ROWS))
    for row, example in zip(answered, examples, strict=True):
        prompt = torch.tensor([example["input_ids"][: example["prompt_length"]]])
        (answer,) = generate_answers(lit.peft_model, tiny_tokenizer, prompt, torch.ones_like(prompt), FEW)
        assert (row["output"], row["finished"]) == (answer.text, int(answer.finished))
        assert row["prompt"] == tiny_tokenizer.decode(prompt[0])
        assert row["reference"] == example["reference"]
        assert row["exact_match"] in (0, 1)


def test_logged_scores_are_those_of_the_rows(
    sums: Any, module: Any, make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, lit, trainer = sums(), module(), make_trainer()
    data.setup("test")
    monkeypatch.setattr(AnswerEvaluation, "_answers", pretended_answers(data.examples("test")))
    trainer.test(lit, data, verbose=False)
    answered, found = read(tmp_path / "run" / "generations-test.jsonl"), numbers(trainer)
    for name in ("exact_match", "exact_match_flexible", "rouge1", "rouge2", "rougeL"):
        assert found[f"test/{name}"] == pytest.approx(sum(row[name] for row in answered) / ROWS, abs=1e-6), name
    assert found["test/exact_match"] == pytest.approx(4 / ROWS)
    outputs, references = ([row[key] for row in answered] for key in ("output", "reference"))
    assert found["test/bleu"] == pytest.approx(sacrebleu.corpus_bleu(outputs, [references]).score / 100, abs=1e-6)
    check = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "check_generations.py"))[
        "differences"
    ]
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"metrics": {"before": found, "after": {}}}))
    differences = check(tmp_path / "run" / "generations-test.jsonl")
    assert differences.keys() == {"rouge1", "rouge2", "rougeL", "exact_match", "bleu"}
    assert max(differences.values()) < 1e-6
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"metrics": {"before": {"test/bleu": 0.0}, "after": {}}}))
    assert check(tmp_path / "run" / "generations-test.jsonl")["bleu"] > 0.01, "the check can fail"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("limit", [None, 3])
def test_two_processes_find_what_one_finds(
    sums: Any, module: Any, make_trainer: Any, tmp_path: Path, limit: int | None
) -> None:
    """Seven rows in batches of two on two processes: one row fills up. The rows of a limit depend on batch times process."""
    scores: dict[int, Any] = {}
    for processes, batch_size in ((1, 4), (2, 2)):
        lit, trainer = module(GenerationSettings(max_new_tokens=6, max_rows=limit)), None
        lit.configure_model()  # forked processes hand their weights back to this one
        strategy = {"strategy": "ddp_fork", "devices": 2} if processes == 2 else {}
        trainer = make_trainer(f"run{processes}", **strategy)
        trainer.test(lit, sums(eval_batch_size=batch_size), verbose=False)
        scores[processes] = numbers(trainer)
    one, two = (read(tmp_path / f"run{n}" / "generations-test.jsonl") for n in (1, 2))
    assert one == two
    assert len(one) == (limit or ROWS)
    assert {"test/loss", "test/bleu", "test/rougeL", "test/exact_match"} <= scores[1].keys()
    assert scores[2] == pytest.approx(scores[1], abs=1e-6)


def test_a_limit_leaves_the_loss_alone(sums: Any, module: Any, make_trainer: Any, tmp_path: Path) -> None:
    losses = []
    for generation in (None, GenerationSettings(max_new_tokens=2, max_rows=3, batch_size=1)):
        trainer = make_trainer()
        trainer.test(module(generation), sums(), verbose=False)
        losses.append(numbers(trainer)["test/loss"])
    assert losses[0] == losses[1]
    assert len(read(tmp_path / "run" / "generations-test.jsonl")) == 3


def test_answers_stop_where_training_teaches_them_to(
    sums: Any, module: Any, make_trainer: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
    stops: list[list[int]] = []

    def generate(model: Any, tokenizer: Any, prompts: Any, mask: Any, settings: Any, seed: int, stop_ids: Any) -> Any:
        stops.append(list(stop_ids))
        return [Answer("so", finished=True)] * len(prompts)

    monkeypatch.setattr("grit_lightning.evaluation.generated_answers.generate_answers", generate)
    datamodule = sums(use_chat_template=True)
    make_trainer().test(module(), datamodule=datamodule, verbose=False)
    learnt = {ids[-2] for ids in datamodule.examples("test")["input_ids"]}  # before the line feed
    assert {tuple(ids) for ids in stops} == {(tiny_tokenizer.convert_tokens_to_ids("<|im_end|>"),)} == {tuple(learnt)}


def test_closed_answers_are_scored_both_ways(boolq: Any, module: Any, make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.test(module(), boolq, verbose=False)
    found = numbers(trainer)
    averages = [f"{macro}{name}" for macro in ("", "macro_") for name in ("precision", "recall", "f1")]
    both = {f"test/{kind}{name}" for kind in ("", "generated_") for name in ("accuracy", *averages)}
    assert both | {"test/loss", "test/unmapped"} == found.keys()
    answered = read(tmp_path / "run" / "generations-test.jsonl")
    assert found["test/unmapped"] == pytest.approx(sum(row["answer"] is None for row in answered) / 6)
    assert found["test/generated_accuracy"] == pytest.approx(sum(row["correct"] for row in answered) / 6)


def test_prediction_returns_and_writes_the_same_answers_as_the_test(
    sums: Any, module: Any, make_trainer: Any, tmp_path: Path
) -> None:
    lit, data = module(), sums()
    predicted = make_trainer().predict(lit, data)
    assert [row["row"] for batch in predicted for row in batch] == list(range(ROWS))
    make_trainer().test(lit, data, verbose=False)
    kinds = [read(tmp_path / "run" / f"generations-{stage}.jsonl") for stage in ("predict", "test")]
    assert kinds[0] == kinds[1] == [row for batch in predicted for row in batch]


def test_generating_in_validation_does_not_change_the_training(
    sums: Any, module: Any, make_trainer: Any, tmp_path: Path
) -> None:
    draws = GenerationSettings(max_new_tokens=4, stages=("val",), do_sample=True, temperature=1.0)
    trained: list[dict[str, torch.Tensor]] = []
    for generation in (None, draws):
        lit = module(generation)
        lit.adapter_config.lora_dropout = 0.3
        torch.manual_seed(1)
        trainer = make_trainer(max_steps=6, val_check_interval=2)
        trainer.fit(lit, sums())
        trained.append(lit.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert "val/rougeL" in numbers(trainer)
    assert len(read(tmp_path / "run" / "generations-val.jsonl")) == ROWS
    trainer.test(lit, sums(), verbose=False)  # not among its stages
    assert not (tmp_path / "run" / "generations-test.jsonl").exists()


def test_the_module_can_be_tested_after_it_was_validated(sums: Any, module: Any, make_trainer: Any) -> None:
    lit, data, trainer = module(GenerationSettings(max_new_tokens=2, stages=("val", "test"))), sums(), make_trainer()
    trainer.validate(lit, data, verbose=False)
    assert "val/rouge1" in numbers(trainer)
    trainer.test(lit, data, verbose=False)
    assert "test/rouge1" in numbers(trainer)


def test_a_mixture_is_evaluated_task_by_task(sums: Any, module: Any, make_trainer: Any, tmp_path: Path) -> None:
    """The prompts of the second task are longer by an instruction, which makes its answers others."""
    (tmp_path / "asked.yaml").write_text('prompt: "Say: {question}\\nA:"\n')
    templates = [str(tmp_path / f"{name}.yaml") for name in ("sums", "asked")]
    lit, trainer = module(GenerationSettings(max_new_tokens=3, max_rows=4, stages=("val", "test"))), make_trainer()
    tasks = [lambda _, template=template: sums(template=template) for template in templates]
    mixture = MixtureDataModule(sums().tokenizer, tasks)
    trainer.validate(lit, mixture, verbose=False)
    trainer.test(lit, mixture, verbose=False)
    assert {"test/sums/rouge1", "test/sums2/rouge1", "test/sums/bleu", "test/sums2/loss"} <= numbers(trainer).keys()
    answered = read(tmp_path / "run" / "generations-test.jsonl")
    assert [row["task"] for row in answered] == ["sums"] * 4 + ["sums2"] * 4
    assert [row["row"] for row in answered[:4]] == sorted(row["row"] for row in answered[:4])
    assert all(row["prompt"].startswith("Say: ") == (row["task"] == "sums2") for row in answered)


def test_the_longest_prompt_is_checked_before_anything_is_generated(sums: Any, module: Any, make_trainer: Any) -> None:
    lit = module(GenerationSettings(max_new_tokens=115))
    lit.configure_model()
    lit.peft_model.get_base_model().register_forward_hook(lambda *_: pytest.fail("the model was asked"))
    lit.test_step = lambda batch, batch_idx: lit._answered(batch, batch_idx, "test")
    with pytest.raises(ValueError, match=r"got \d+ for a prompt of \d+ tokens and an answer of up to 115"):
        make_trainer().test(lit, sums(), verbose=False)


def test_an_evaluation_that_fails_leaves_the_former_file(
    sums: Any, module: Any, make_trainer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "run" / "generations-test.jsonl"
    file.parent.mkdir()
    file.write_text("before")
    lit, trainer = module(), make_trainer()
    lit.configure_model()
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 12:
            raise RuntimeError("on purpose")

    handle = lit.peft_model.get_base_model().register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.test(lit, sums(), verbose=False)
    assert file.read_text() == "before"
    handle.remove()
    trainer.test(lit, sums(), verbose=False)
    assert [row["row"] for row in read(file)] == list(range(ROWS))


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")  # barebones says so for every loss
@pytest.mark.parametrize("mode", ["fast_dev_run", "barebones"])
def test_trial_runs_write_no_file(sums: Any, module: Any, tmp_path: Path, mode: str) -> None:
    settings: dict[str, Any] = {mode: True, "callbacks": [GenerationWriter(str(tmp_path / "run"))]}
    pl.Trainer(accelerator="cpu", **settings).test(module(), sums(), verbose=False)
    assert not (tmp_path / "run").exists()


def test_a_data_module_that_tells_no_references_is_refused(module: Any, make_trainer: Any, random_batch: Any) -> None:
    class Plain(pl.LightningDataModule):
        def test_dataloader(self) -> DataLoader[Any]:
            return DataLoader([random_batch()], batch_size=None)

    with pytest.raises(MisconfigurationException, match=r"expected a data module with .* examples\(split\).*got Plain"):
        make_trainer().test(module(), Plain(), verbose=False)
    make_trainer().test(module(None), Plain(), verbose=False)
