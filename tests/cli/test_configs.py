"""Every shipped configuration is found, opens as the house style wants it, and trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from grit_lightning.cli import main
from grit_lightning.configs import find_config, shipped_configs

OVERLAYS = ("ablations/fixed_rank", "ablations/no_kfac", "ablations/no_reprojection", "ablations/plain_adapter")
PROBES = ("probes/forgetting",)
STRATEGIES = ("strategy/ddp", "strategy/fsdp", "strategy/fsdp2")
CONFIGS = ("boolq", "boolq_llama3.1_8b", "boolq_llama3.2_3b", "demo")


def test_all_shipped_configs_are_known_here() -> None:
    assert sorted(shipped_configs()) == sorted(OVERLAYS + PROBES + STRATEGIES + CONFIGS)
    assert len(shipped_configs()) == 12


@pytest.mark.parametrize("name", CONFIGS)
def test_config_trains(name: str, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", name, *tiny, "--trainer.fast_dev_run=2"])
    assert "Run finished" in capsys.readouterr().out
    assert not list(Path().iterdir())  # fast_dev_run writes nothing


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
        main(["fit", "--config", "boolq_llama3.1_8b", "--config", name, *tiny, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["strategy"]["init_args"]["timeout"] in ("0:15:00", "15 minutes", 900.0)


@pytest.mark.parametrize("name", OVERLAYS + PROBES + STRATEGIES + CONFIGS)
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


@pytest.mark.parametrize(("name", "rank"), [("boolq_llama3.2_3b", 16), ("boolq_llama3.1_8b", 32)])
def test_paper_configs_hold_the_papers_values(name: str, rank: int) -> None:
    config = yaml.safe_load(shipped_configs()[name].read_text(encoding="utf-8"))
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    adapter, geometry = model["adapter"]["init_args"], model["geometry"]
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"], model["quantization"]) == (
        rank,
        16,
        0.0,
        "nf4",
    )
    assert (geometry["kfac_update_freq"], geometry["kfac_min_samples"], geometry["kfac_damping"]) == (150, 256, 5e-3)
    assert (data["max_length"], data["batch_size"], trainer["accumulate_grad_batches"]) == (512, 8, 4)
    assert (trainer["max_steps"], trainer["max_epochs"], trainer["gradient_clip_val"]) == (1200, 3, 1.0)
    reprojection, adaptation = (entry["init_args"] for entry in trainer["callbacks"][:2])
    assert (reprojection["every_n_steps"], reprojection["start_step"], reprojection["k"]) == (200, 500, 8)
    assert (adaptation["threshold"], adaptation["min_rank"], adaptation["start_step"]) == (0.90, 4, 500)


def test_a_file_wins_over_a_shipped_name(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("{}")
    assert find_config("demo") == Path("demo")
    assert find_config("demo.yaml") == shipped_configs()["demo"]
    assert find_config("ablations/no_kfac.yaml") == shipped_configs()["ablations/no_kfac"]


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"nosuch.*ablations/fixed_rank, .*, demo"):
        find_config("nosuch")
