"""Reports on data modules: what stands in them is what the rows and the training batches hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from grit_lightning.datamodules import (
    ClassificationDataModule,
    InstructionDataModule,
    MixtureDataModule,
    TaskDataModule,
    TextDataModule,
)
from grit_lightning.datamodules.pipeline.batch_rows import rows_of_batches
from grit_lightning.datamodules.pipeline.row_report import SeenTask, batches_of_epoch, epoch_report

from ..chat_families import CHAT_FAMILIES, CONVERSATION, chat_tokenizer
from ..task_cases import TaskCase

Make = Callable[..., TaskDataModule]


def _training_batches(module: Any) -> list[dict[str, torch.Tensor]]:
    return list(module.train_dataloader())


def test_the_splits_of_every_task_are_counted_as_its_batches_show_them(case: TaskCase, make: Make) -> None:
    module = make(case)
    module.setup("fit")

    report = SeenTask.of(module, ["train", "validation"]).report()

    numbers, batches = report["splits"]["train"], _training_batches(module)
    assert numbers["rows"] == sum(len(batch["labels"]) for batch in batches)
    assert numbers["tokens"] == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert numbers["learnt_tokens"] == sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert sum(numbers["classes"].values()) == (numbers["rows"] if module.choices else 0)
    assert numbers["answers_without_end"] == (numbers["rows"] if module.choices else 0)
    assert set(report["overlap"]) == {"validation"}
    assert report["max_length"] == module.max_length
    assert json.loads(json.dumps(report)) == report


def test_rows_that_are_cut_or_left_out_are_counted_with_the_reason(
    make: Make, cases: dict[str, TaskCase], write_rows: Any, tmp_path: Any, boolq_rows: Any
) -> None:
    rows = [
        *boolq_rows(6),
        *boolq_rows(2, first=50, passage="long " * 200 + "{}"),
        {**boolq_rows(1)[0], "question": ""},
    ]
    source = write_rows(tmp_path / "train.jsonl", rows).parent
    write_rows(tmp_path / "validation.jsonl", boolq_rows(2, first=80))
    module = make(cases["boolq"], source=str(source), invalid_rows="skip", max_length=128)
    with pytest.warns(
        UserWarning, match=r"of 9 rows, 2 lost the end of 'passage' to fit; 1 left out: column 'question'"
    ):
        module.setup("fit")

    numbers = SeenTask.of(module, ["train", "validation"]).report()["splits"]["train"]

    assert (numbers["rows"], numbers["cut"], numbers["left_out"]) == (8, 2, 1)
    assert numbers["problems"] == {
        "lost the end of 'passage' to fit": 2,
        "left out: column 'question' empty or no text": 1,
    }


def test_a_held_out_row_that_is_a_training_row_is_found(
    make: Make, cases: dict[str, TaskCase], write_rows: Any, tmp_path: Any, boolq_rows: Any
) -> None:
    rows = boolq_rows(6)
    contrary = {**rows[2], "answer": not rows[2]["answer"]}
    source = write_rows(tmp_path / "train.jsonl", rows).parent
    write_rows(tmp_path / "validation.jsonl", [rows[0], contrary, *boolq_rows(2, first=80)])
    module = make(cases["boolq"], source=str(source))
    module.setup("fit")

    assert SeenTask.of(module, ["train", "validation"]).report()["overlap"] == {
        "validation": {"same_rows": 1, "same_prompts": 1}
    }


def test_a_row_is_shown_with_its_tokens_and_what_is_learnt(case: TaskCase, make: Make) -> None:
    module = make(case)
    module.setup("fit")

    (row, _) = SeenTask.of(module, ["train"]).shown("train", 2)

    (start, end), encoded = row["learnt"], module.examples("train")[0]
    assert "".join(row["tokens"]) == module.tokenizer.decode(encoded["input_ids"])
    assert "".join(row["tokens"][start:end]).removesuffix("</s>").strip() == encoded["reference"].strip()
    assert (row["split"], row["row"]) == ("train", 0)


@pytest.mark.parametrize("settings", [{}, {"length_bucketing": True}, {"packing": True}], ids=str)
@pytest.mark.parametrize("processes", [1, 3])
def test_an_epoch_is_counted_as_its_batches_are(
    make: Make, cases: dict[str, TaskCase], settings: dict[str, Any], processes: int
) -> None:
    module = make(cases["dolly"], **settings)
    module.setup("fit")
    module.trainer = _Processes(processes)  # type: ignore[assignment]
    found = []
    for rank in range(processes):
        module.trainer.rank = rank  # type: ignore[union-attr]
        found += [batch["attention_mask"] for batch in _training_batches(module)]
    module.trainer.rank = 0  # type: ignore[union-attr]

    loader = module.train_dataloader()
    epoch = epoch_report(batches_of_epoch(module, loader, processes, len(loader)), len(loader), processes, 2)

    assert epoch["batches"] == len(found) / processes
    assert epoch["optimizer_steps"] == -(-len(loader) // 2)
    assert epoch["rows"] == sum(map(len, found))
    assert epoch["tokens"] == sum(int(mask.sum()) for mask in found)
    assert epoch["padding_share"] == pytest.approx(1 - epoch["tokens"] / sum(mask.numel() for mask in found))


def test_an_epoch_of_a_mixture_is_counted_with_the_rows_that_are_drawn(
    cases: dict[str, TaskCase], folder: Callable[[TaskCase], Any], tokenizer: Any
) -> None:
    def task(name: str) -> Callable[[Any], TaskDataModule]:
        case = cases[name]
        return lambda tokens: case.cls(tokens, source=str(folder(case)), max_length=640, holdout=0.25)

    module = MixtureDataModule(
        tokenizer, [task("boolq"), task("dolly")], weights=[3, 1], rows_per_epoch=40, batch_size=8
    )
    module.setup("fit")
    masks = [batch["attention_mask"] for batch in _training_batches(module)]

    loader = module.train_dataloader()
    epoch = epoch_report(batches_of_epoch(module, loader, 1, len(loader)), len(loader), 1, 1)

    assert (epoch["batches"], epoch["rows"]) == (5, 40)
    assert epoch["tokens"] == sum(int(mask.sum()) for mask in masks)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma3", "phi3"])
def test_a_conversation_is_shown_with_every_answer_marked(name: str, write_jsonl: Any, tmp_path: Any) -> None:
    source = write_jsonl(tmp_path / "train.jsonl", [{"messages": CONVERSATION}] * 6)
    module = InstructionDataModule(chat_tokenizer(name), str(source), holdout=0.2)
    module.setup("fit")

    seen = SeenTask.of(module, ["train", "validation"])
    row, report = seen.shown("train", 1)[0], seen.report()

    spans = zip(row["learnt"][::2], row["learnt"][1::2], strict=True)
    assert ["".join(row["tokens"][start:end]) for start, end in spans] == CHAT_FAMILIES[name].learnt
    assert report["splits"]["train"]["answers_without_end"] == 0
    assert report["overlap"]["validation"]["same_rows"] == report["splits"]["validation"]["rows"]


def test_blocks_of_text_have_no_prompt_to_share_and_no_answer_to_end(
    write_jsonl: Any, tmp_path: Any, tokenizer: Any
) -> None:
    rows = [{"text": "The same beginning, " + "and more " * 20 + str(n)} for n in range(10)]
    module = TextDataModule(tokenizer, str(write_jsonl(tmp_path / "train.jsonl", rows)), max_length=64, holdout=0.2)
    module.setup("fit")

    report = SeenTask.of(module, ["train", "validation"]).report()

    numbers = report["splits"]["train"]
    assert (
        numbers["answers_without_end"]
        == numbers["contradicting_rows"]
        == report["overlap"]["validation"]["same_prompts"]
        == 0
    )
    assert numbers["learnt_tokens"] == numbers["tokens"] - numbers["rows"]  # all but the first of each block


def test_labels_are_counted_by_name(write_jsonl: Any, tmp_path: Any, tokenizer: Any) -> None:
    rows = [{"text": f"Text {n}", "label": "rare" if n == 0 else "common"} for n in range(10)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "validation.jsonl", rows[1:3])
    module = ClassificationDataModule(tokenizer, str(tmp_path))
    module.setup("validate")
    module.setup("fit")

    splits = SeenTask.of(module, ["train", "validation"]).report()["splits"]

    assert splits["validation"]["classes"] == {"common": 2, "rare": 0}
    assert splits["train"]["classes"]["rare"] == 1


class _Processes:
    """What a data module asks a Trainer of several processes."""

    ckpt_path = None
    rank = 0

    def __init__(self, processes: int) -> None:
        self.processes = processes

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"num_replicas": self.processes, "rank": self.rank}


def test_batches_of_any_loader_are_taken_apart(make: Make, cases: dict[str, TaskCase]) -> None:
    module = make(cases["dolly"], padding_side="left")
    module.setup("fit")

    rows, lengths = rows_of_batches(_training_batches(module))

    encoded = module.examples("train")
    assert sorted(row.tolist() for row in rows.tokens) == sorted(encoded["input_ids"][:])
    assert sorted(map(list, rows.learnt)) == sorted(encoded["learnt"][:])
    assert [length for batch in lengths for length in batch] == rows.lengths


def test_batches_without_labels_are_refused_by_what_they_hold() -> None:
    with pytest.raises(ValueError, match=r"^data: expected batches with input_ids and labels.*got \['image'\]"):
        rows_of_batches([{"image": torch.zeros(2, 2)}])
    with pytest.raises(ValueError, match=r"^data: expected batches with input_ids and labels.*got list"):
        rows_of_batches([[torch.zeros(2, 2)]])
