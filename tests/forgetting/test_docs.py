"""What docs/forgetting.md shows can be built."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import yaml

from grit_lightning.callbacks import ForgettingProbe
from grit_lightning.configs import find_config

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "forgetting.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


def test_the_python_example_builds_a_probe() -> None:
    names: dict[str, object] = {}
    exec(compile(block("python"), "docs/forgetting.md", "exec"), names)
    assert isinstance(names["probe"], ForgettingProbe)


def test_the_yaml_example_builds_a_probe() -> None:
    (entry,) = yaml.safe_load(block("yaml"))["trainer"]["callbacks+"]
    assert entry["class_path"] == "ForgettingProbe"
    probe = ForgettingProbe(**entry["init_args"])
    assert [text.label for text in probe.texts] == ["wikitext2", "c4"]
    assert [task.label for task in probe.zero_shot] == ["arc_easy", "winogrande"]


def test_the_command_names_shipped_configurations() -> None:
    words = shlex.split(block("bash"))
    named = [after for word, after in pairwise(words) if word == "--config"]
    assert [find_config(name).stem for name in named] == ["demo", "forgetting"]
