"""The task's rows for `grit retain`: of which split, none of them trained on, and metrics of the answers to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from grit_lightning.cli import retain_rows
from grit_lightning.cli.retain_rows import GENERATED, task_rows
from grit_lightning.datamodules import BoolQDataModule, GSM8KDataModule, InstructionDataModule, MixtureDataModule
from grit_lightning.errors import InvalidValueError
from grit_lightning.evaluation.generation import Answer, GenerationSettings
from grit_lightning.evaluation.text_metrics import text_metrics

Rows = Sequence[dict[str, Any]]


@pytest.fixture
def model(tiny_llama: LlamaForCausalLM, lora_config: Callable[..., LoraConfig], randomize: Any) -> PeftModel:
    adapted = get_peft_model(tiny_llama, lora_config())
    randomize(adapted)
    return adapted.eval()


def write(folder: Path, **splits: Rows) -> str:
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def pairs(numbers: range, text: str = "") -> Rows:
    return [{"prompt": f"{n}?{text}", "completion": f"{n}!"} for n in numbers]


def texts(tokenizer: PreTrainedTokenizerFast, rows: Rows) -> set[str]:
    return {tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows}


def test_training_rows_are_for_statistics_and_validation_rows_to_measure_on(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write(
        tmp_path / "a", train=pairs(range(40)), validation=pairs(range(50, 70)), test=pairs(range(80, 99), " test")
    )

    found = task_rows(InstructionDataModule(tiny_tokenizer, source), 12, 8, seed=1)

    assert (len(found.calibration), len(found.held_out), found.metric, found.remarks) == (12, 8, None, [])
    assert all(set(row) == {"input_ids", "learnt"} for row in found.calibration + found.held_out)
    numbers = [
        {int("".join(filter(str.isdigit, text.partition("?")[0]))) for text in texts(tiny_tokenizer, rows)}
        for rows in found[:2]
    ]
    assert numbers[0] <= set(range(40))
    assert numbers[1] <= set(range(50, 70))
    again = InstructionDataModule(tiny_tokenizer, source)
    assert task_rows(again, 12, 8, seed=1)[:2] == found[:2]
    assert task_rows(again, 12, 8, seed=2)[:2] != found[:2]


def test_validation_rows_that_were_trained_on_are_left_out(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write(tmp_path / "a", train=pairs(range(40)), validation=pairs(range(36, 44)))

    found = task_rows(InstructionDataModule(tiny_tokenizer, source), 1, 8, seed=1)

    assert len(found.held_out) == 4
    assert found.remarks == ["Instruction: 4 of 8 validation rows are training rows too, and are left out."]
    same = write(tmp_path / "b", train=pairs(range(40)), validation=pairs(range(8)), test=pairs(range(50, 60)))
    with pytest.raises(
        InvalidValueError, match="expected validation rows of Instruction that are no training rows, got 8"
    ):
        task_rows(InstructionDataModule(tiny_tokenizer, same), 1, 8, seed=1)


def boolq(folder: Path, tokenizer: PreTrainedTokenizerFast) -> BoolQDataModule:
    rows = [{"question": f"is {n} even", "passage": f"It is {n}.", "answer": n % 2 == 0} for n in range(60)]
    return BoolQDataModule(tokenizer, write(folder, train=rows[:40], validation=rows[40:]), max_length=128)


def test_each_task_of_a_mixture_gives_its_share(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    own = write(tmp_path / "own", train=pairs(range(40)), validation=pairs(range(50, 70)))
    tasks = [
        lambda tokenizer: InstructionDataModule(tokenizer, own),
        lambda tokenizer: boolq(tmp_path / "b", tokenizer),
    ]

    found = task_rows(MixtureDataModule(tiny_tokenizer, tasks), 10, 8, seed=0)

    assert (len(found.calibration), len(found.held_out)) == (10, 8)
    assert sum("even" in text for text in texts(tiny_tokenizer, found.held_out)) == 4
    assert found.remarks == [
        "BoolQ: 4 rows of the validation split, on which results are reported, steer the choice here."
    ]
    with pytest.raises(InvalidValueError, match="--task_metric: expected none for a mixture"):
        task_rows(MixtureDataModule(tiny_tokenizer, tasks), 10, 8, seed=0, metric="accuracy")


def test_accuracy_is_that_of_the_likelier_answer_row_by_row(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, model: PeftModel
) -> None:
    task = boolq(tmp_path / "b", tiny_tokenizer)
    found = task_rows(task, 4, 12, seed=0, metric="accuracy", batch_size=5)
    assert found.metric is not None

    with torch.no_grad():
        scores = found.metric(model)

        expected = []
        for row in found.held_out:
            prompt = row["input_ids"][: row["learnt"][0]]
            likelihoods = []
            for choice in (tiny_tokenizer(f" {word}").input_ids for word in task.choices):
                ids = torch.tensor([prompt + choice])
                logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                likelihoods.append(float(logits[range(len(choice)), choice].mean()))
            answer = row["input_ids"][slice(*row["learnt"])]
            right = [tiny_tokenizer(f" {word}").input_ids for word in task.choices].index(answer)
            expected.append(float(likelihoods.index(max(likelihoods)) == right))
    assert scores.tolist() == expected


def test_generated_answers_are_scored_row_by_row(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"{n}?", "answer": f"so it is\n#### {n}"} for n in range(30)]
    task = GSM8KDataModule(tiny_tokenizer, write(tmp_path / "g", train=rows), max_length=96, holdout=0.3)
    seen: list[int] = []

    def answer(model: Any, tokenizer: Any, prompts: Any, mask: Any, settings: GenerationSettings, *args: Any) -> Any:
        assert (settings.max_new_tokens, settings.max_rows) == (7, None)
        asked = [tokenizer.decode(ids[real.bool()]) for ids, real in zip(prompts, mask, strict=True)]
        numbers = [int("".join(filter(str.isdigit, text))) for text in asked]
        seen.extend(numbers)
        return [Answer(f"#### {n if n % 2 else 'none'}", True) for n in numbers]

    monkeypatch.setattr("grit_lightning.evaluation.generated_answers.generate_answers", answer)
    settings = GenerationSettings(max_new_tokens=7, max_rows=2)
    found = task_rows(task, 4, 8, seed=0, metric="exact_match", generation=settings, batch_size=3)
    assert found.metric is not None

    scores = found.metric(model)

    assert scores.tolist() == [float(n % 2) for n in seen]
    held_out = [tiny_tokenizer.decode(row["input_ids"]).partition("?")[0] for row in found.held_out]
    assert [int("".join(filter(str.isdigit, text))) for text in held_out] == seen


def test_a_metric_that_the_task_lacks_is_refused_with_those_it_has(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    own = InstructionDataModule(tiny_tokenizer, write(tmp_path / "a", train=pairs(range(40))))
    with pytest.raises(
        InvalidValueError, match="--task_metric: expected one of rouge1, rouge2, rougeL for Instruction"
    ):
        task_rows(own, 4, 4, seed=0, metric="accuracy")
    with pytest.raises(InvalidValueError, match="Did you mean `rougeL`"):
        task_rows(own, 4, 4, seed=0, metric="rougel")


def test_every_score_of_a_row_is_known_by_its_name(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    settings = GenerationSettings(bertscore_encoder=None)
    kinds = ["rouge", "exact_match", "exact_text", "classification"]
    scored = text_metrics(kinds, ["no", "yes"], settings, torch.device("cpu"))
    found = {key for metric in scored.values() for key in metric.score(["yes"], ["yes #### 1"], [1])[0]}
    assert {retain_rows._CALLED.get(name, name) for kind in kinds for name in GENERATED[kind]} <= found


class Others(LightningDataModule):
    """Batches of somebody else's data module."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.first)

    def loader(self, first: int) -> DataLoader[Any]:
        rows = [torch.tensor([10, 20, first + n, 2]) for n in range(8)]
        return DataLoader([{"input_ids": row, "labels": row.where(row < 20, -100)} for row in rows], batch_size=4)


def test_batches_of_anybody_s_data_module_give_rows() -> None:
    found = task_rows(Others(4), 6, 8, seed=0)

    assert [row["input_ids"][2] for row in found.calibration] == list(range(6))
    assert found.held_out == [{"input_ids": [10, 20, n, 2], "learnt": [0, 1, 2, 4]} for n in range(6, 12)]
    with pytest.raises(InvalidValueError, match="expected validation rows that are no training rows"):
        task_rows(Others(0), 8, 8, seed=0)
    with pytest.raises(InvalidValueError, match="--task_metric: expected none for a Others"):
        task_rows(Others(4), 8, 8, seed=0, metric="accuracy")
    blind = Others(4)
    del Others.val_dataloader
    with pytest.raises(InvalidValueError, match="got a Others without val_dataloader"):
        task_rows(blind, 8, 8, seed=0)
