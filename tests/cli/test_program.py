"""What `grit` says before torch is imported: its help, its version, and what is wrong with the words.

Every error is one sentence that suggests what was meant.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grit_lightning import __version__
from grit_lightning.cli.program import PURPOSES, main, overview
from grit_lightning.cli.run import GritCLI
from grit_lightning.configs import shipped_configs

WRONG = {
    "fitt --config demo": "Did you mean `fit`?",
    "--config demo fit": "Write it first: `grit fit --config …`.",
    "fit": "no data: add --config or --data.",
    "fit --model.adapter.r 8": "no data: add --config or --data.",
    "fit --data.source here": "no data: add --config or --data.",
    "fit --config dmo": "expected a file or the name of a shipped configuration, got neither. Did you mean `demo`?",
    "fit --config no_kfac": "Did you mean `ablations/no_kfac`?",
    "fit --config": "--config: expected a value, got none.",
    "fit --config broken.yaml": "--config broken.yaml: expected YAML, got what cannot be parsed:",
    "fit --config list.yaml": "--config list.yaml: expected settings by name, got list.",
    "fit --config demo --ckpt_path no.ckpt": "--ckpt_path: expected a checkpoint, got no.ckpt, which does not exist.",
    "test --ckpt_path no/such/file": "--ckpt_path: expected a checkpoint, got no/such/file, which does not exist.",
    "test --ckpt_path .": "--ckpt_path: expected a checkpoint, got ., which is a folder.",
    "test --config demo --ckpt_path best": "--ckpt_path: expected a path or `last`, got `best`",
    "test --ckpt_path last": "--ckpt_path last: expected --output or --config to name the run, got neither.",
    "data": "no data: add --config or --data.",
    "data --config demo --split dev": "--split: expected one of train, validation, test, got 'dev'.",
    "export --ckpt a --output b": "--ckpt: there is no such option. Did you mean `--ckpt_path`?",
    "export --output b": "the following arguments are required: --ckpt_path",
    "export --output b --ckpt_path no.ckpt": "--ckpt_path: expected a checkpoint, got no.ckpt, which does not exist.",
    "export --output b --ckpt_path last": "--ckpt_path last: expected --output or --config to name the run, got neither.",
    "retain --adapter a --output b --mu 1": "--general: expected a file, folder or hub id of general text",
    "retain --adapter a --output b --general c": "expected exactly one of --task_tolerance, --forgetting, --mu",
    "retain --adapter a --output b --general c --mu 1 --config demo": "--adapter: expected a folder with adapter_config.json",
    "retain --ckpt_path no.ckpt --output b --general c --mu 1": "--ckpt_path: expected a checkpoint, got no.ckpt",
    "prepare --task gsm": "--task: expected one of alpaca, boolq, dolly, gsm8k, imdb, qnli, got 'gsm'. Did you mean `gsm8k`?",
    "eval-harness --adapter a --task b": "--task: there is no such option. Did you mean `--tasks`?",
}
SHOWN = ("--help", "--version", "export --help", "retain --help", "prepare --help", "eval-harness --help")

WITHOUT_TORCH = """
import contextlib, io, json, shlex, sys
from grit_lightning.cli import main
said = {}
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        main(shlex.split(words))
    said[words] = [out.getvalue(), err.getvalue(), "torch" in sys.modules]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, bool]]:
    """Words → what is written to stdout and stderr, and whether torch was imported, in a process of its own."""
    folder = tmp_path_factory.mktemp("said")
    (folder / "broken.yaml").write_text("a: [1, 2\nb: {")
    (folder / "list.yaml").write_text("[1, 2]")
    words = json.dumps([*WRONG, *SHOWN])
    command = [sys.executable, "-c", WITHOUT_TORCH]
    root = str(Path(__file__).resolve().parents[2])
    result = subprocess.run(
        command, input=words, capture_output=True, text=True, check=True, cwd=folder, env={"PYTHONPATH": root}
    )
    return {name: tuple(found) for name, found in json.loads(result.stdout).items()}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_words_are_one_sentence_without_torch(words: str, said: dict[str, tuple[str, str, bool]]) -> None:
    out, err, torch_is_there = said[words]
    first, *more = err.splitlines()
    assert first.startswith("grit: error: ")
    assert WRONG[words] in first
    assert len(more) <= 1  # where the options are listed
    assert out == ""
    assert not torch_is_there


@pytest.mark.parametrize("words", SHOWN)
def test_help_and_version_need_no_torch(words: str, said: dict[str, tuple[str, str, bool]]) -> None:
    out, err, torch_is_there = said[words]
    assert out
    assert not err
    assert not torch_is_there


def test_help_lists_all_subcommands_and_all_shipped_configurations_in_whole_sentences(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    assert shown == overview()
    assert set(GritCLI.subcommands()) < set(PURPOSES)
    assert len(PURPOSES) == 10
    words = shown.replace(",", " ").split()
    assert {*PURPOSES, *shipped_configs()} <= set(words)
    assert all(purpose.endswith(".") for purpose in PURPOSES.values())
    assert max(map(len, shown.splitlines())) <= 120


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"grit {__version__}\n"


@pytest.mark.parametrize("words", [["fit", "--help"], ["predict", "--help"]])
def test_the_help_of_a_run_begins_with_what_it_does(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(words)
    shown = " ".join(capsys.readouterr().out.split())  # argparse breaks lines at the width of the terminal
    assert shown.startswith(f"usage: grit {words[0]} [--config NAME ...] [options] {PURPOSES[words[0]]} options:")
