"""`grit data` shows what the model of a `grit fit` would see, and runs nothing."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from grit_lightning import module
from grit_lightning.cli.data_page import MOST_TOKENS, print_report, row_text
from grit_lightning.cli.program import main

Report = dict[str, Any]


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(module, "load_backbone", refuse)


@pytest.fixture
def shown(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `grit data` prints for the demo's task on 16 and 8 questions: `shown("--show=0")`."""

    def run(*words: str) -> str:
        main(["data", "--config=demo", *tiny, *words])
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def report(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The same as a report, with one row."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cache = tmp_path_factory.mktemp("cache")
        main(["data", "--config=demo", *tiny, f"--data.cache_dir={cache}", "--json", "--show=1"])
    return dict(json.loads(out.getvalue()))


def _printed(report: Report, **console: Any) -> str:
    file = io.StringIO()
    print_report(Console(file=file, **({"width": 120} | console)), report)
    return file.getvalue()


def test_off_a_terminal_a_page_is_plain_text_with_marks_around_what_is_learnt(
    shown: Callable[..., str], tmp_path: Path
) -> None:
    text = shown()

    assert "\x1b" not in text
    assert "It is 0.\nSentiment:⟦ positive⟧\n" in text
    assert "training row 3 of 16:" in text
    assert "training row 4" not in text
    assert "│ rows                         │       16 │          8 │" in text
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]  # no run folder


def test_json_holds_what_the_page_shows(report: Report, shown: Callable[..., str]) -> None:
    assert _printed(report, width=80) == shown("--show=1")
    (task,) = report["tasks"].values()
    assert (task["splits"]["train"]["rows"], task["splits"]["validation"]["rows"]) == (16, 8)
    assert task["splits"]["train"]["classes"] == {"negative": 8, "positive": 8}
    assert task["overlap"]["validation"] == {"same_rows": 8, "same_prompts": 0}  # the fixture's rows are the same
    assert any("8 of 8 validation rows (100.0%) are training rows too" in said for said in task["advice"])


def test_on_a_terminal_what_is_learnt_is_coloured_and_tokens_are_told_apart(report: Report) -> None:
    text = _printed(report, force_terminal=True, color_system="truecolor")

    (row,) = next(iter(report["tasks"].values()))["rows"]
    start, end = row["learnt"]
    styled = row_text(row, colours=True)
    learnt = "".join(styled.plain[span.start : span.end] for span in styled.spans if "green" in str(span.style))
    assert learnt == "".join(row["tokens"][start:end])
    assert len({str(span.style) for span in styled.spans}) > 2  # tokens beside each other differ
    assert "\x1b[97;48;5;22m" in text  # bright white on dark green
    assert "⟦" not in text


def test_without_colours_on_a_terminal_marks_stand_in_for_them(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    text = _printed(report, force_terminal=True, color_system="truecolor")

    assert "⟦ positive⟧" in text


def test_rows_of_another_split_can_be_asked_for(shown: Callable[..., str]) -> None:
    (task,) = json.loads(shown("--json", "--show=2", "--split=test"))["tasks"].values()

    assert [(row["split"], row["row"]) for row in task["rows"]] == [("test", 0), ("test", 1)]
    assert list(task["splits"]) == ["train", "validation", "test"]


def test_steps_and_epochs_follow_processes_accumulation_and_limits(shown: Callable[..., str]) -> None:
    words = ["--trainer.devices=2", "--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=0.75"]
    words += ["--trainer.max_steps=-1", "--trainer.max_epochs=3", "--data.batch_size=2"]

    found = json.loads(shown("--json", "--show=0", *words))

    epoch = found["epoch"]
    assert (epoch["processes"], epoch["batches"], epoch["batches_per_step"]) == (2, 3, 2)  # of 4, with 8 rows a process
    assert (epoch["rows"], epoch["optimizer_steps"], found["run"]["optimizer_steps"]) == (12, 2, 6)
    assert next(iter(found["tasks"].values()))["rows"] == []


def test_each_task_of_a_mixture_is_shown_in_turn(
    tiny: list[str], boolq_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"class_path": "BoolQDataModule", "init_args": {"source": str(boolq_dir), "max_length": 128}}
    data = {
        "class_path": "MixtureDataModule",
        "init_args": {"tasks": [task, task], "batch_size": 4, "rows_per_epoch": 20},
    }
    words = [word for word in tiny if not word.startswith("--data.")]

    main(["data", "--config=shared/task", f"--data={json.dumps(data)}", *words, "--show=1", "--trainer.max_steps=3"])

    text = capsys.readouterr().out
    assert text.index("boolq, training row 1 of 16") < text.index("boolq2, training row 1 of 16")
    assert "An epoch: 5 batches, 5 optimizer steps of 1, 20 rows" in text
    assert "The run: 3 optimizer steps, 0.6 epochs." in text


def test_the_length_of_a_run_on_own_rows_is_that_which_follows_from_them(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(20)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    main(["data", "--config=instruct", *tiny, "--data.source=mine.jsonl", "--json", "--show=0"])
    found = json.loads(capsys.readouterr().out)

    assert found["remarks"] == [
        "Instruction train data (mine.jsonl): 20 rows, read as prompt_completion (prompt, completion)."
    ]
    epoch = found["epoch"]
    assert (epoch["rows"], epoch["optimizer_steps"]) == (18, 5)  # two rows are held out
    assert found["run"]["optimizer_steps"] == 10 * 5  # RunLength: as many as 10 epochs have


_OF_OTHERS = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

class Own(LightningDataModule):
    def __init__(self, tokenizer=None, seed=42, images=False):
        super().__init__()
        self.images = images

    def train_dataloader(self):
        if self.images:
            return DataLoader([{"image": torch.zeros(3)}] * 8)
        ids = torch.tensor([72, 105, 33, 2])
        labels = torch.tensor([-100, -100, 33, 2])
        return DataLoader([{"input_ids": ids, "labels": labels}] * 10, batch_size=4)
"""


def test_a_data_module_of_anybody_s_shows_its_first_batches(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "of_others.py").write_text(_OF_OTHERS)
    monkeypatch.syspath_prepend(tmp_path)
    without_rows = [word for word in tiny if not word.startswith("--data.")]
    words = ["--config=shared/task", *without_rows, "--data=of_others.Own", "--trainer.max_epochs=1"]

    main(["data", *words, "--json", "--show=1"])
    found = json.loads(capsys.readouterr().out)

    (task,) = found["tasks"].values()
    assert task["splits"]["train"]["rows"] == 10
    assert task["rows"][0]["learnt"] == [2, 4]
    assert task["rows"][0]["tokens"][3] == "</s>"
    assert (found["epoch"]["batches"], found["epoch"]["tokens"]) == (3, None)
    with pytest.raises(SystemExit):
        main(["data", *words, "--data.images=true"])
    assert "got ['image']" in capsys.readouterr().err


_OWN_TASK = """
from grit_lightning.datamodules import TaskDataModule

class MineDataModule(TaskDataModule):
    schema = ("question", "reply")

    def answer(self, row):
        return row["reply"]
"""


def test_a_task_of_one_s_own_is_shown(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_task.py").write_text(_OWN_TASK)
    (tmp_path / "mine.yaml").write_text('prompt: "{question}\\n"\nanswer: "{answer}"\n')
    rows = [{"question": f"{n}?", "reply": f"{n}!"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.syspath_prepend(tmp_path)
    own = [
        "--config=shared/task",
        "--data=own_task.MineDataModule",
        "--data.source=rows.jsonl",
        "--data.template=mine.yaml",
    ]

    main(["data", *own, *[word for word in tiny if not word.startswith("--data.source")], "--show=1"])

    text = capsys.readouterr().out
    assert "MineDataModule" in text
    assert "!</s>⟧\n" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--show=-1"], "--show: expected a number of at least 0, got -1."),
        (["--data.batchsize=3"], "data.batchsize: IMDbDataModule has no such setting."),
        (["--data.source=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(
    shown: Callable[..., str], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        shown(*words)

    assert said in capsys.readouterr().err


def test_of_a_long_row_the_middle_is_left_out() -> None:
    row = {"tokens": ["a"] * 1_000 + ["b"], "learnt": [1_000, 1_001]}

    assert row_text(row, colours=False).plain == f"{'a' * 300} … 401 tokens … {'a' * 299}⟦b⟧"
    assert MOST_TOKENS == 600


def test_what_a_row_holds_cannot_steer_the_terminal() -> None:
    row = {"tokens": ["\x1b[2J", "\n", "x"], "learnt": [2, 3]}

    assert row_text(row, colours=False).plain == "␛[2J\n⟦x⟧"
    assert row_text(row, colours=True).plain == "␛[2J↵\nx"


def test_spans_that_touch_are_marked_apart() -> None:
    assert row_text({"tokens": ["a", "b", "c"], "learnt": [0, 1, 1, 2]}, colours=False).plain == "⟦a⟧⟦b⟧c"
