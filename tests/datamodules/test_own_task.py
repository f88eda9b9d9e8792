"""A task of one's own: what its class or its settings lack is said in one sentence, and the rest works at first try."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grit_lightning.datamodules import TaskDataModule

ROWS = [{"question": f"What is {n}?", "reply": f"It is {n}."} for n in range(40)]


class MineDataModule(TaskDataModule):
    schema = ("question", "reply")

    def answer(self, row: Any) -> str:
        return str(row["reply"])


@pytest.fixture
def settings(tmp_path: Path, write_jsonl: Callable[..., Path]) -> dict[str, str]:
    """Rows and a template."""
    template = tmp_path / "mine.yaml"
    template.write_text('prompt: "Q: {question} A:"\n')
    return {"source": str(write_jsonl(tmp_path / "rows.jsonl", ROWS)), "template": str(template)}


def test_rows_and_a_template_are_enough(tiny_backbone_dir: Path, settings: dict[str, str]) -> None:
    module = MineDataModule(str(tiny_backbone_dir), **settings)
    module.setup()
    assert {split: len(module.examples(split)) for split in ("train", "validation")} == {"train": 38, "validation": 2}
    prompt = module.examples("train")[0]
    assert module.tokenizer.decode(prompt["input_ids"]).startswith("Q: What is ")


def test_the_task_of_the_documentation_works(tiny_backbone_dir: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (template,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    space: dict[str, Any] = {"__name__": "mine"}
    exec(code, space)
    (tmp_path / "mine.yaml").write_text(template)
    module = space["MineDataModule"](str(tiny_backbone_dir), **settings)
    module.setup()
    row = module.examples("train")[0]
    assert module.tokenizer.decode(row["input_ids"]).startswith("Question: What is 0?\nAnswer: It is 0.")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"schema": ("question",)}, r"OwnDataModule: expected .* with the method `answer\(self, row\)`"),
        ({"answer": MineDataModule.answer}, r"OwnDataModule: expected .* with the attribute `schema`"),
        ({}, r"OwnDataModule: expected .* with the attribute `schema`, its columns and the method `answer"),
    ],
)
def test_what_a_class_lacks_is_named(tiny_tokenizer: Any, body: dict[str, Any], message: str) -> None:
    own = type("OwnDataModule", (TaskDataModule,), body)
    with pytest.raises(TypeError, match=message):
        own(tiny_tokenizer, "rows.jsonl", "boolq")


def test_the_base_class_itself_is_no_task(tiny_tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="TaskDataModule: expected a subclass of TaskDataModule"):
        TaskDataModule(tiny_tokenizer)


def test_a_task_without_a_table_on_the_hub_asks_for_a_source(tiny_tokenizer: Any, settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="source: expected a folder or file of data, as MineDataModule names no table"):
        MineDataModule(tiny_tokenizer, template=settings["template"])


def test_a_task_without_a_template_asks_for_one(tiny_tokenizer: Any, settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="template: expected a template's name or path, as MineDataModule has no"):
        MineDataModule(tiny_tokenizer, source=settings["source"])


def test_without_a_length_that_was_asked_for_tokenizer_and_backbone_set_it(
    tiny_backbone_dir: Path, tiny_tokenizer: Any, tmp_path: Path, make_tiny_llama: Any, settings: dict[str, str]
) -> None:
    assert MineDataModule(str(tiny_backbone_dir), **settings).max_length == 128
    assert MineDataModule(tiny_tokenizer, **settings).max_length == 128
    tiny_tokenizer.model_max_length = 10**30  # as tokenizers say that know of no limit
    assert MineDataModule(tiny_tokenizer, **settings).max_length == 1024
    tiny_tokenizer.save_pretrained(tmp_path)
    assert MineDataModule(str(tmp_path), **settings).max_length == 1024
    make_tiny_llama(max_position_embeddings=64).save_pretrained(tmp_path)
    assert MineDataModule(str(tmp_path), **settings).max_length == 64


def test_a_length_that_was_asked_for_is_kept_or_refused(tiny_tokenizer: Any, settings: dict[str, str]) -> None:
    assert MineDataModule(tiny_tokenizer, **settings, max_length=100).max_length == 100
    with pytest.raises(ValueError, match="max_length: expected at most the 128 tokens"):
        MineDataModule(tiny_tokenizer, **settings, max_length=200).setup()


@pytest.mark.parametrize("reply", [["a"], 1.5, None], ids=str)  # None: a function that forgets to return
def test_an_answer_that_is_no_text_is_refused_with_its_row(
    tiny_tokenizer: Any, settings: dict[str, str], reply: Any
) -> None:
    class OddDataModule(MineDataModule):
        def answer(self, row: Any) -> Any:
            return reply

    with pytest.raises(ValueError, match=r"row \d: answer: expected text from the task's `answer`, got"):
        OddDataModule(tiny_tokenizer, **settings).setup()
