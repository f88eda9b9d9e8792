"""Prompt templates.

Shipped ones belong to a task, name only columns that it has, and read as their authors wrote them; a chat template without
wording of its own gets the plain one. Unknown names, files that are no template, and placeholders that are no column are
refused with what was found. The examples in the docstrings of the pipeline hold.
"""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest

from grit_lightning.datamodules import TASKS, BoolQDataModule, ClassificationDataModule
from grit_lightning.datamodules.pipeline.prompts import PromptTemplate, shipped_templates


def test_every_shipped_template_names_only_columns_of_its_task() -> None:
    assert set(TASKS) <= set(shipped_templates())
    tasks = {**TASKS, "classify": ClassificationDataModule}
    for name in shipped_templates():
        PromptTemplate.load(name).check(tasks[name.removesuffix("_instruct")].schema)


def test_a_chat_has_wording_of_its_own_only_if_the_task_ships_it(tiny_tokenizer: Any) -> None:
    class Other(BoolQDataModule):
        default_template = "gsm8k"

    class Bare(BoolQDataModule):
        default_template = "bare"

    assert Other(tiny_tokenizer).template == "gsm8k"
    assert Other(tiny_tokenizer, use_chat_template=True).template == "gsm8k_instruct"
    assert Bare(tiny_tokenizer, use_chat_template=True).template == "bare"


def test_boolq_prompt_reads_as_in_the_harness() -> None:
    row = {"passage": "Ice is {cold}.", "question": "is ice cold"}
    assert PromptTemplate.load("boolq").render(row) == "Ice is {cold}.\nQuestion: is ice cold?\nAnswer:"


def test_an_empty_column_selects_its_own_prompt() -> None:
    template = PromptTemplate("{instruction} | {input}", prompt_without={"input": "{instruction}"})
    assert template.render({"instruction": "Add.", "input": "1 2"}) == "Add. | 1 2"
    assert template.render({"instruction": "Sing.", "input": " "}) == "Sing."


def test_unknown_template_lists_the_shipped_names() -> None:
    with pytest.raises(FileNotFoundError, match=r"template: expected .*boolq, boolq_instruct.*, got 'nope'"):
        PromptTemplate.load("nope")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("- a list", "list"),
        ("answer: ' {answer}'", r"\['answer'\]"),
        ("{prompt: a, promt: b}", r"\['prompt', 'promt'\]"),
    ],
)
def test_a_file_that_is_no_template_is_refused_with_what_was_found(tmp_path: Path, content: str, found: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"mine\.yaml: expected a mapping with `prompt`.*, got {found}"):
        PromptTemplate.load(str(path))


@pytest.mark.parametrize(
    "template",
    [
        PromptTemplate("{context}"),
        PromptTemplate("{question}", truncate="context"),
        PromptTemplate("{question}", prompt_without={"context": "{question}"}),
    ],
)
def test_a_placeholder_that_is_no_column_is_refused(template: PromptTemplate) -> None:
    with pytest.raises(ValueError, match=r"expected columns of the task, \['passage', 'question'\], got \['context'\]"):
        template.check(("question", "passage"))


def test_an_answer_without_its_placeholder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected {answer} and nothing else .* `answer`, got ' {label}'"):
        PromptTemplate("{question}", answer=" {label}").check(("question",))


@pytest.mark.parametrize(
    "module",
    [
        "datamodules.pipeline.collate",
        "datamodules.pipeline.orders",
        "datamodules.pipeline.packing",
        "datamodules.pipeline.prompts",
        "datamodules.pipeline.splits",
        "datamodules.pipeline.text",
        "batches",
    ],
)
def test_examples_in_docstrings_hold(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"grit_lightning.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
