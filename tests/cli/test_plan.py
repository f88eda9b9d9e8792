"""`grit plan`: what is printed, against a real run; nothing is left behind; what is wrong is one sentence."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grit_lightning.cli.plan_text import print_plan
from grit_lightning.cli.program import main

WITHIN = 0.15  # how far an estimate may be from what is measured


def run(words: list[str]) -> str:
    """What the program prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["plan", "--config=demo", *words])
    return printed.getvalue()


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != "cache"]  # token ids, as a run keeps them


@pytest.fixture(scope="module")
def measured(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The plan of the run `trained`, with a measured step, and the folder that it was made in."""
    folder = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        adapter = ["--model.adapter.r=5", "--model.adapter.lora_alpha=7"]
        text = run([*tiny, *adapter, "--trainer.max_steps=4", "--json", "--measure=1", "--devices=4"])
    return json.loads(text), folder


def test_tensors_of_a_real_step_are_those_that_were_estimated(measured: tuple[dict[str, Any], Path]) -> None:
    report, folder = measured
    assert report["measured"]["tensors"] == pytest.approx(report["measured"]["estimated"], rel=WITHIN)
    assert report["measured"]["time_to_finish"] == 4 * report["measured"]["seconds_per_step"] > 0
    assert left_in(folder) == []


def test_a_run_writes_the_checkpoint_that_was_planned(measured: tuple[dict[str, Any], Path], trained: Path) -> None:
    report, _ = measured
    file = trained / "checkpoints" / "last.ckpt"
    assert report["checkpoint"] == pytest.approx(file.stat().st_size, rel=0.05)  # Lightning's counters are a few KB
    weights = torch.load(file, weights_only=True)["state_dict"].values()
    assert report["adapter"]["trainable_parameters"] == sum(weight.numel() for weight in weights)


def test_the_table_names_every_part_and_place(
    measured: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    print_plan(measured[0])
    text = capsys.readouterr().out
    for name in ("weights", "adapter", "optimizer states", "statistics", "activations", "total"):
        assert f"\n{name}" in text
    for place in ("one device", "DDP on 4", "FSDP on 4", "one device, NF4"):
        assert place in text
    assert "14 layers (2 q_proj, 2 k_proj" in text
    assert " s a step (median of 1)" in text
    assert "│" not in text  # plain text off a terminal


def test_a_plan_for_several_processes_needs_none_of_them(tiny: list[str], tmp_path: Path) -> None:
    several = ["--config=strategy/fsdp", "--trainer.devices=4", "--trainer.max_steps=-1", "--trainer.max_epochs=1"]
    report = json.loads(run([*tiny, *several, "--json"]))
    assert report["run"]["placement"] == "FSDP"
    assert report["run"]["optimizer_steps"] == 1  # 16 rows, 4 processes, 4 rows each
    memory = report["memory"]
    assert memory["FSDP on 4"]["exchange"] == 0
    assert memory["DDP on 4"]["exchange"] > memory["one device"]["exchange"] == 0
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--measure=0"], "--measure: expected a number of at least 1, got 0"),
        (["--devices=0"], "--devices: expected a number of at least 1, got 0"),
        (["--measure", "--trainer.devices=2"], "--measure: expected a run on one process, got one on 2"),
        (["--trainer.strategy=fsdp"], "trainer.strategy: expected auto or one of ddp"),
        (["--data.batch_size=0"], "batch_size: expected numbers of at least 1"),
        (["--model.adapter.target_modules=[no_proj]"], "adapter.target_modules"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    tiny: list[str], words: list[str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run([*tiny, *words])
    assert stopped.value.code in (1, 2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("grit: error: ")]
    assert len(errors) == 1
    assert named in errors[0]
    assert left_in(tmp_path) == []
