"""Token ids on disk: the same for anything that does not change them, made anew for anything that does, made once."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from grit_lightning.datamodules import BoolQDataModule, TaskDataModule
from grit_lightning.datamodules.pipeline.text_files import files_hash
from grit_lightning.datamodules.pipeline.token_cache import content_hash, source_hash
from grit_lightning.datamodules.pipeline.tokenized import RowEncoder

TaskCase = Any  # of conftest.py
Make = Callable[..., TaskDataModule]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was tokenised, in order."""
    calls: list[str] = []
    read = RowEncoder.encode_table

    def counted(self: RowEncoder, *args: Any) -> Any:
        calls.append(self.where)
        return read(self, *args)

    monkeypatch.setattr(RowEncoder, "encode_table", counted)
    return calls


def examples(module: TaskDataModule) -> list[dict[str, Any]]:
    module.setup("fit")
    return list(module.examples("train").to_list())


def test_what_prepare_data_has_made_is_not_made_again(case: TaskCase, make: Make, made: list[str]) -> None:
    make(case).prepare_data()
    prepared = len(made)
    assert prepared == 3
    module = make(case)
    module.setup()
    assert len(made) == prepared
    assert all(file["filename"].endswith(".arrow") for file in module.examples("train").cache_files)  # on disk


def test_prepare_data_makes_what_the_trainer_is_going_to_ask_for(
    cases: dict[str, TaskCase], make: Make, made: list[str]
) -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.trainer.states import TrainerFn

    module = make(cases["gsm8k"])
    module.trainer = Trainer(barebones=True, accelerator="cpu")
    module.trainer.state.fn = TrainerFn.TESTING
    module.prepare_data()
    assert [where.split()[1] for where in made] == ["test"]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 600},
        {"template": "boolq_instruct"},
        {"append_eos": True},
        {"normalise_text": False},
        {"invalid_rows": "skip"},
        {"train_limit": 5},
        {"columns": {"question": "passage", "passage": "question"}},
        {"tokenizer": "vocabulary"},
        {"tokenizer": "chat template"},
        {"source": "row"},
        {"task": "code"},
    ],
    ids=str,
)
def test_whatever_changes_token_ids_makes_another_file(
    cases: dict[str, TaskCase], make: Make, made: list[str], tokenizer: Any, folder: Any, change: dict[str, Any]
) -> None:
    case = cases["boolq"]
    source = folder(case)
    before = examples(make(case, source=str(source)))
    del made[:]
    if change.pop("source", None):
        path = source / "train.jsonl"
        path.write_text(path.read_text().replace("Body 3 is cold", "Body 3 is warm"))
    if changed := change.pop("tokenizer", None):
        if changed == "vocabulary":
            tokenizer.add_tokens(["is cold"])
        else:
            tokenizer.chat_template = "{{ messages[0].content }}"
            change["use_chat_template"] = True
    module = make(case, source=str(source), **{name: value for name, value in change.items() if name != "task"})
    if "task" in change:

        class Opposite(case.cls):  # type: ignore[name-defined, misc]
            def answer(self, row: Any) -> str:
                return "no" if super().answer(row) == "yes" else "yes"

        module.__class__ = Opposite
    after = examples(module)
    assert any(" train " in where for where in made)
    assert (after != before) == (change.keys().isdisjoint({"max_length", "normalise_text", "invalid_rows"}))


def test_other_rows_under_the_same_name_size_and_time_are_read(
    cases: dict[str, TaskCase], make: Make, folder: Any
) -> None:
    path = folder(cases["boolq"]) / "train.jsonl"
    before = examples(make(cases["boolq"], source=str(path.parent)))
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_text(path.read_text().replace("Body 3 is cold", "Body 3 is warm"))
    os.utime(path, ns=times)
    after = examples(make(cases["boolq"], source=str(path.parent)))
    assert len(before) == len(after)
    assert before != after


def test_a_line_that_moves_to_the_next_file_is_seen(tmp_path: Path) -> None:
    first, second = tmp_path / "train-0.jsonl", tmp_path / "train-1.jsonl"
    first.write_text('{"a": "1"}\n{"a": "2"}\n')
    second.write_text('{"b": "3"}\n')
    before = files_hash([first, second])
    first.write_text('{"a": "1"}\n')
    second.write_text('{"a": "2"}\n{"b": "3"}\n')
    assert files_hash([first, second]) != before


TYPED = """
class Typed(BoolQDataModule):
    def answer(self, row):
        return WORDS[super().answer(row)]
"""


def typed(module: str, **names: Any) -> type:
    """A class as an interpreter makes it, without a file."""
    space: dict[str, Any] = {"BoolQDataModule": BoolQDataModule, "__name__": module, **names}
    exec(TYPED, space)
    return space["Typed"]  # type: ignore[no-any-return]


def test_code_that_was_typed_in_counts_with_the_names_it_uses() -> None:
    same, other = {"yes": "yes", "no": "no"}, {"yes": "no", "no": "yes"}
    module = "no_such_module"
    first = source_hash(typed(module, WORDS=same), BoolQDataModule)
    assert source_hash(typed(module, WORDS=same), BoolQDataModule) == first
    assert source_hash(typed(module, WORDS=other), BoolQDataModule) != first


def test_a_constant_beside_the_class_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    hashes = []
    for word in ("yes", "no"):
        (tmp_path / f"task_{word}.py").write_text(
            f"from grit_lightning.datamodules import BoolQDataModule\nWORD = {word!r}\n{TYPED}"
        )
        hashes.append(source_hash(importlib.import_module(f"task_{word}").Typed, BoolQDataModule))
    assert hashes[0] != hashes[1]


def test_a_setting_of_gsm8ks_answers_makes_another_file(cases: dict[str, TaskCase], make: Make) -> None:
    kept, without = (make(cases["gsm8k"], calculator_annotations=keep) for keep in (True, False))
    assert examples(kept) != examples(without)


def test_a_copy_of_the_data_elsewhere_finds_the_same_file(
    cases: dict[str, TaskCase], make: Make, made: list[str], folder: Any, tmp_path: Path
) -> None:
    source = folder(cases["boolq"])
    first = examples(make(cases["boolq"], source=str(source)))
    del made[:]
    source.rename(tmp_path / "elsewhere")
    assert (
        examples(make(cases["boolq"], source=str(tmp_path / "elsewhere"), batch_size=2, num_workers=0, seed=7)) == first
    )
    assert not made


def test_the_content_hash_sees_values_names_and_types_and_not_how_rows_are_stored() -> None:
    table = datasets.Dataset.from_dict({"a": [str(n) for n in range(2500)]})
    same = datasets.concatenate_datasets([table.select(range(700)), table.select(range(700, 2500))])
    assert content_hash(same) == content_hash(table)
    assert content_hash(table.select([*range(2499), 0])) != content_hash(table)
    assert content_hash(table.rename_column("a", "b")) != content_hash(table)
    assert content_hash(datasets.Dataset.from_dict({"a": list(range(2500))})) != content_hash(table)


def test_counts_of_left_out_rows_are_told_from_the_cache_too(
    cases: dict[str, TaskCase], make: Make, tmp_path: Path, write_jsonl: Any
) -> None:
    source = str(
        write_jsonl(
            tmp_path / "dev.jsonl", [*(cases["qnli"].row(n) for n in range(4)), {**cases["qnli"].row(5), "label": -1}]
        )
    )
    for _ in range(2):
        module = make(cases["qnli"], source=source, invalid_rows="skip")
        with pytest.warns(UserWarning, match="of 5 rows, 1 left out: no usable answer"):
            module.setup("validate")
        assert module.dropped == {"validation": 1}


def test_a_damaged_file_is_made_again(cases: dict[str, TaskCase], make: Make, tmp_path: Path) -> None:
    first = examples(make(cases["boolq"], cache_dir=str(tmp_path / "cache")))
    for file in (tmp_path / "cache").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:50])
    assert examples(make(cases["boolq"], cache_dir=str(tmp_path / "cache"))) == first


def test_a_folder_that_cannot_be_written_is_named_with_the_setting(
    cases: dict[str, TaskCase], make: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cache_dir: expected a folder that can be written to, got .*file: "):
        make(cases["boolq"], cache_dir=str(tmp_path / "file")).setup("fit")


def _prepare(module: TaskDataModule, barrier: Any, results: Any) -> None:
    calls = 0
    read = RowEncoder.encode_table

    def counted(self: RowEncoder, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return read(self, *args)

    RowEncoder.encode_table = counted  # type: ignore[method-assign]  # of this process
    barrier.wait()
    module.setup("fit")
    results.put((calls, module.examples("train").to_list()))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12, where other tests have left threads
def test_two_processes_at_the_same_time_tokenise_once(cases: dict[str, TaskCase], make: Make, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    modules = [make(cases["boolq"], cache_dir=str(tmp_path / "cache")) for _ in range(2)]
    processes = [context.Process(target=_prepare, args=(module, barrier, results)) for module in modules]
    for process in processes:
        process.start()
    (calls, rows), (others_calls, others_rows) = (results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert calls + others_calls == 2  # training and validation, each by one of them
    assert rows == others_rows
    assert len(rows) == 12
    assert not [path.name for path in (tmp_path / "cache").iterdir() if path.suffix not in (".arrow", ".lock")]
