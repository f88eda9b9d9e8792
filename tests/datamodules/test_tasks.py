"""What each task learns, read back from its batches.

Exactly the answer is learnt, with and without a chat template; a task reports on its own split, and what is held out does not
depend on the seed of the run; files of any kind and columns of other names give the same rows; tasks keep the paper's lengths.
Real files are read whole and have the published rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grit_lightning.datamodules import GSM8KDataModule, QNLIDataModule, TaskDataModule
from grit_lightning.datamodules.pipeline.prompts import PromptTemplate
from grit_lightning.datamodules.pipeline.text import normalise

TaskCase = Any  # of conftest.py
Make = Callable[..., TaskDataModule]
Read = Callable[[TaskDataModule, Any], list[tuple[str, str]]]


def numbers(case: TaskCase, module: TaskDataModule, split: str) -> set[int]:
    """Which of the generated rows a split holds, told from their answers and prompts."""
    examples = module.examples(split)
    return {int(re.findall(r"\d+", module.tokenizer.decode(ids))[0]) for ids in examples["input_ids"]}


@pytest.mark.parametrize("side", ["left", "right"])
def test_exactly_the_answer_is_learnt_of_every_row(case: TaskCase, make: Make, read: Read, side: str) -> None:
    module = make(case, padding_side=side)
    module.setup("fit")
    template = PromptTemplate.load(case.cls.default_template)
    rows = {n: {column: str(case.row(n)[column]) for column in case.cls.schema} for n in range(12)}
    expected = [(template.render(rows[n]), case.learnt(n)) for n in sorted(numbers(case, module, "train"))]
    assert sorted(read(module, module.train_dataloader())) == sorted(expected)
    assert len(expected) >= 6


def test_every_task_reports_on_its_own_split_and_parts_of_training_stand_in_for_missing_ones(
    case: TaskCase, make: Make
) -> None:
    module = make(case)
    module.setup()
    train, validation, test = (numbers(case, module, split) for split in ("train", "validation", "test"))
    assert not train & validation
    assert not train & test
    published = set(range(100, 106))
    if case.test_on == "validation":
        assert train == set(range(12))
        assert validation == test == published
    elif case.test_on in case.cls.hub_splits:
        assert (len(train), len(validation), test) == (9, 3, published)
    else:
        assert (len(train), len(validation), len(test)) == (6, 3, 3)
        assert train | validation | test == set(range(12))


def test_what_is_held_out_does_not_depend_on_the_seed_of_the_run(case: TaskCase, make: Make) -> None:
    def held(**overrides: Any) -> tuple[set[int], ...]:
        module = make(case, **overrides)
        module.setup()
        return tuple(numbers(case, module, split) for split in ("validation", "test"))

    assert held(seed=1) == held(seed=2)
    assert (held(seed=1) != held(holdout_seed=5)) == (case.test_on == "test")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_one_file_of_any_kind_gives_the_same_rows(
    case: TaskCase, make: Make, tmp_path: Path, write_rows: Callable[..., Path], suffix: str
) -> None:
    rows = [case.row(n) for n in range(12)]
    module = make(case, source=str(write_rows(tmp_path / f"rows{suffix}", rows)))
    module.setup("fit")
    expected = make(case, source=str(write_rows(tmp_path / "other.jsonl", rows)))
    expected.setup("fit")
    assert module.examples("train").to_list() == expected.examples("train").to_list()


def test_columns_may_have_other_names(case: TaskCase, make: Make, tmp_path: Path, write_jsonl: Any) -> None:
    names = {column: f"my {column}" for column in case.cls.schema}
    rows = [{names.get(column, column): value for column, value in case.row(n).items()} for n in range(12)]
    module = make(case, source=str(write_jsonl(tmp_path / "mine.jsonl", rows)), columns=names)
    module.setup("fit")
    assert len(module.examples("train")) >= 6


def test_chat_templates_wrap_the_prompt_and_leave_the_answer(
    case: TaskCase, make: Make, read: Read, chat_template: str
) -> None:
    module = make(case, use_chat_template=True)
    module.tokenizer.chat_template = chat_template
    module.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|eot_id|>"]})
    module.setup("fit")
    begins = "bos_token" in chat_template
    opens = "<|start_header_id|>assistant<|end_header_id|>\n\n" if begins else "<|im_start|>assistant\n"
    pairs = read(module, module.train_dataloader())
    assert pairs
    for prompt, learnt in pairs:
        assert prompt.endswith(opens)
        assert prompt.count("<s>") == begins
        assert "### " not in prompt.replace('"#### "', "")  # its own plain words, not those of the plain prompt
        assert "today" not in prompt  # or the data would change overnight
        end = "<|eot_id|>" if begins else "<|im_end|>\n"
        assert learnt in {case.learnt(n).lstrip().replace("</s>", end) for n in range(12)}


def test_an_empty_optional_column_has_its_own_prompt(cases: dict[str, TaskCase]) -> None:
    for name, column, empty in [("alpaca", "input", "### Input"), ("dolly", "context", "Input:")]:
        template = PromptTemplate.load(name)
        row = {key: str(value) for key, value in cases[name].row(1).items()}
        assert empty in template.render(row)
        assert empty not in template.render({**row, column: ""})
        assert template.render({**row, column: ""}).rstrip().endswith("### Response:")


def test_gsm8k_can_do_without_calculator_annotations(make: Make, cases: dict[str, TaskCase]) -> None:
    module = make(cases["gsm8k"], calculator_annotations=False)
    kept = make(cases["gsm8k"])
    for each in (module, kept):
        each.setup("test")
    assert module.examples("test")["reference"][0] == "It is 100+1=101.\n#### 101"
    assert kept.examples("test")["reference"][0] == "It is 100+1=<<100+1=101>>101.\n#### 101"


@pytest.mark.parametrize(("label", "answer"), [(0, "yes"), ("entailment", "yes"), (1, "no"), ("not_entailment", "no")])
def test_qnli_knows_both_distributions_labels(tiny_tokenizer: Any, label: Any, answer: str) -> None:
    assert QNLIDataModule(tiny_tokenizer).answer({"label": label}) == answer


def test_tasks_keep_the_papers_lengths_and_name_their_metrics(tiny_tokenizer: Any, cases: dict[str, TaskCase]) -> None:
    tiny_tokenizer.model_max_length = 2048
    tasks = {name: case.cls(tiny_tokenizer) for name, case in cases.items()}
    lengths = {"alpaca": 2048, "dolly": 2048, "boolq": 512, "qnli": 512, "gsm8k": 1024}
    assert {name: tasks[name].max_length for name in lengths} == lengths
    for name in ("alpaca", "dolly"):
        assert tasks[name].text_metrics == ("rouge", "bleu", "bertscore")
    for name in ("boolq", "qnli"):
        assert tasks[name].text_metrics == ("classification",)
        averages = {f"{macro}{name}" for macro in ("", "macro_") for name in ("precision", "recall", "f1")}
        assert set(tasks[name].metrics() or ()) == {"accuracy"} | averages
    assert tasks["gsm8k"].text_metrics == ("exact_match", "rouge")
    assert tasks["gsm8k"].metrics() is None


def test_real_files_are_read_whole_and_their_answers_come_back(
    case: TaskCase, real_file: Callable[[TaskCase], Path], tokenizer: Any
) -> None:
    tokenizer.model_max_length = 10**6
    split = "test" if case.cls is GSM8KDataModule else "validation"
    module = case.cls(tokenizer, source=str(real_file(case)), max_length=20_000, val_limit=200, test_limit=200)
    module.setup("validate" if split == "validation" else "test")
    examples = module.examples(split)
    assert module.dropped == {split: 0}
    assert module.truncated == {split: 0}
    source = {normalise(str(module.answer(row))) for row in module.table.rows(split, limit=200, seed=module.seed).table}
    for example in examples:
        learnt = tokenizer.decode(example["input_ids"][example["prompt_length"] :])
        assert learnt.strip().removesuffix("</s>") == example["reference"].strip()
        assert example["reference"] in source


def test_the_real_gsm8k_and_qnli_have_the_published_rows(
    real_file: Callable[[TaskCase], Path], tiny_tokenizer: Any, cases: dict[str, TaskCase]
) -> None:
    gsm8k = GSM8KDataModule(tiny_tokenizer, source=str(real_file(cases["gsm8k"]).parent)).table
    assert {split: len(gsm8k.read(split)) for split in ("train", "test")} == {"train": 7473, "test": 1319}
    qnli = QNLIDataModule(tiny_tokenizer, source=str(real_file(cases["qnli"]))).table.read("validation")
    assert len(qnli) == 5463
    assert set(qnli.unique("label")) == {"entailment", "not_entailment"}
