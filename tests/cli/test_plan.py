"""`grit plan`: what is printed, against a real run; nothing is left behind; what is wrong is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grit_lightning.cli.program import main

WITHIN = 0.15  # how far an estimate may be from what is measured


@pytest.fixture
def plan(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """`plan("--json", …)`: what the program prints, of the demo on the tiny model."""

    def run(*words: str) -> str:
        capsys.readouterr()
        main(["plan", "--config=demo", *tiny, *words])
        return capsys.readouterr().out

    return run


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != "cache"]  # token ids, as a run keeps them


def test_the_table_names_every_part_and_place(plan: Any, tmp_path: Path) -> None:
    text = plan("--devices=4")
    for name in ("weights", "adapter", "optimizer states", "statistics", "activations", "total"):
        assert f"\n{name}" in text
    for place in ("one device", "DDP on 4", "FSDP on 4", "one device, NF4"):
        assert place in text
    assert "14 layers (2 q_proj, 2 k_proj" in text
    assert "│" not in text  # plain text off a terminal
    assert left_in(tmp_path) == []


def test_measured_tensors_are_those_that_were_estimated(plan: Any, tmp_path: Path) -> None:
    report = json.loads(plan("--json", "--measure=1"))
    measured = report["measured"]
    assert measured["tensors"] == pytest.approx(measured["estimated"], rel=WITHIN)
    assert measured["time_to_finish"] == report["run"]["optimizer_steps"] * measured["seconds_per_step"]
    assert left_in(tmp_path) == []


def test_a_checkpoint_is_as_large_as_planned(plan: Any, trained: Path) -> None:
    report = json.loads(plan("--json", "--model.adapter.r=5", "--model.adapter.lora_alpha=7"))
    size = (trained / "checkpoints" / "last.ckpt").stat().st_size
    assert report["checkpoint"] == pytest.approx(size, rel=0.05)  # Lightning's own counters are a few KB


def test_parameters_are_those_that_a_run_trains(plan: Any, trained: Path) -> None:
    report = json.loads(plan("--json", "--model.adapter.r=5"))
    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert report["adapter"]["trainable_parameters"] == sum(weight.numel() for weight in state.values())


def test_a_plan_for_several_processes_needs_none_of_them(plan: Any) -> None:
    words = ["--trainer.devices=4", "--config=strategy/fsdp", "--trainer.max_steps=-1", "--trainer.max_epochs=1"]
    report = json.loads(plan("--json", *words, "--trainer.devices=4"))
    assert report["run"]["placement"] == "FSDP"
    assert report["run"]["optimizer_steps"] == 1  # 16 rows, 4 processes, 4 rows each
    assert "FSDP on 4" in report["memory"]


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
    plan: Any, words: list[str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan(*words)
    assert stopped.value.code in (1, 2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("grit: error: ")]
    assert len(errors) == 1
    assert named in errors[0]
    assert left_in(tmp_path) == []
