"""`SettingsCLI`: what `grit fit` would build, with nothing run and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grit_lightning.cli.plain_parser import FitWordsParser
from grit_lightning.cli.processes import configured_processes
from grit_lightning.cli.run_words import settle
from grit_lightning.cli.settings_only import SettingsCLI
from grit_lightning.datamodules import IMDbDataModule
from grit_lightning.errors import InvalidValueError

Grit = Callable[..., None]


def built(tiny: list[str], *words: str, processes: int | None = None) -> SettingsCLI:
    return SettingsCLI(settle("fit", ["--config=demo", *tiny, *words]), processes)


def test_it_builds_what_the_words_say_and_writes_nothing(tiny: list[str], tmp_path: Path) -> None:
    cli = built(tiny, "--model.adapter.r=5")
    assert cli.model.adapter_config.r == 5
    assert cli.model.model is None
    assert isinstance(cli.datamodule, IMDbDataModule)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "processes", "steps"),
    [
        (["--trainer.max_steps=-1", "--trainer.max_epochs=3"], 1, 12),  # 16 rows in batches of 4
        (["--trainer.max_steps=-1", "--trainer.max_epochs=3", "--trainer.accumulate_grad_batches=3"], 1, 6),
        (["--trainer.max_steps=-1", "--trainer.max_epochs=3"], 2, 6),
        (["--trainer.max_steps=7"], 2, 7),
    ],
)
def test_steps_are_those_of_the_run(tiny: list[str], words: list[str], processes: int, steps: int) -> None:
    assert built(tiny, *words, processes=processes).count_steps() == steps


def test_a_run_without_end_has_no_number_of_steps(tiny: list[str]) -> None:
    assert built(tiny, "--trainer.max_steps=-1", "--trainer.max_epochs=-1").count_steps() is None


def test_a_fit_takes_as_many_steps(grit: Grit, tiny: list[str]) -> None:
    words = ["--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=3", "--data.train_limit=13"]
    grit("fit", *words, "--trainer.max_steps=-1", "--output=run")
    taken = torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert built(tiny, *words, "--trainer.max_steps=-1").count_steps() == taken


def test_a_setting_that_is_wrong_is_named(tiny: list[str]) -> None:
    with pytest.raises(InvalidValueError, match=r"batch_size"):
        built(tiny, "--data.batch_size=0")


@pytest.mark.parametrize(
    ("settings", "processes"),
    [
        ({"devices": 4}, 4),
        ({"devices": "3", "num_nodes": 2}, 6),
        ({"devices": [0, 2]}, 2),
        ({"devices": "0,3"}, 2),
        ({"devices": "auto", "accelerator": "cpu"}, 1),
    ],
)
def test_processes_are_those_of_the_trainers_settings(settings: dict[str, object], processes: int) -> None:
    assert configured_processes(settings) == processes


def test_own_options_are_taken_out_of_the_words_of_fit() -> None:
    parser = FitWordsParser("grit x", "Does x.")
    parser.add_argument("--json", action="store_true")
    own, rest = parser.split(["--config", "demo", "--json", "--data.batch_size=2"])
    assert own.json
    assert rest == ["--config", "demo", "--data.batch_size=2"]
