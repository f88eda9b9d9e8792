"""The pages of docs/ name what there is. None of this needs MkDocs; test_site.py builds the pages."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from grit_lightning import callbacks, datamodules
from grit_lightning.callbacks.step_timer import PHASES
from grit_lightning.cli.program import PURPOSES
from grit_lightning.configs import find_config
from grit_lightning.runs.folder import FILES_OF_A_RUN
from grit_lightning.telemetry.quantities import SPECTRAL_QUANTITIES

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
DATA_MODULES = sorted({each.__name__ for each in vars(datamodules).values() if inspect.isclass(each)})


def generated(page: str) -> list[str]:
    """Objects whose docstrings a page shows."""
    return re.findall(r"^::: (\S+)$", PAGES[page], re.MULTILINE)


def blocks(language: str) -> list[tuple[str, str]]:
    """Code blocks of a language, with the page that each stands in; blocks inside of tabs too."""
    fence = re.compile(rf"^( *)```{language}\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
    return [(name, textwrap.dedent(match[2])) for name, page in PAGES.items() for match in fence.finditer(page)]


def commands() -> list[tuple[str, list[str]]]:
    """Words of every `grit` command in a block, with its page."""
    lines = [(name, line) for name, block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [(name, shlex.split(line, comments=True)[1:]) for name, line in lines if line.startswith("grit ")]


def pages_of(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages_of(value)


def test_the_navigation_has_every_page_once() -> None:
    assert sorted(pages_of(SETTINGS["nav"])) == sorted(PAGES)


@pytest.mark.parametrize("name", callbacks.__all__)
def test_every_callback_has_a_section_with_its_settings(name: str) -> None:
    assert f"grit_lightning.callbacks.{name}" in generated("callbacks.md")
    if name != "GeometryCallback":  # the base of others
        assert f"grit_lightning.callbacks.{name}" in generated("configuration.md")
        assert f"\n## {name}\n" in PAGES["callbacks.md"]


@pytest.mark.parametrize("name", DATA_MODULES)
def test_every_data_module_is_in_the_api_and_its_settings_in_the_configuration(name: str) -> None:
    assert f"grit_lightning.datamodules.{name}" in generated("api.md")
    if "__init__" in vars(getattr(datamodules, name)):
        assert f"grit_lightning.datamodules.{name}" in generated("configuration.md")


def test_what_pages_generate_from_can_be_imported() -> None:
    paths = {path for page in PAGES for path in generated(page)}
    assert len(paths) >= 30
    for path in paths:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


def test_every_file_of_a_run_is_in_the_table() -> None:
    assert [name for name in FILES_OF_A_RUN if f"`{name}" not in PAGES["command_line.md"]] == []


def test_every_logged_quantity_is_named() -> None:
    page = PAGES["callbacks.md"]
    named = [f"{name}_{side}" for name in SPECTRAL_QUANTITIES for side in "ag"] + [f"time/{phase}" for phase in PHASES]
    assert [name for name in named if f"`{name}`" not in page] == []


def test_commands_name_subcommands_and_shipped_configurations() -> None:
    found = commands()
    assert len(found) >= 15
    for page, words in found:
        assert words[0] in PURPOSES, page
        for option, name in pairwise(words):
            if option == "--config" and not name.startswith("runs/"):
                assert find_config(name).is_file()


def test_python_blocks_are_python() -> None:
    found = blocks("python")
    assert len(found) >= 6
    for page, block in found:
        ast.parse(block, page)


def test_yaml_blocks_are_yaml() -> None:
    found = blocks("yaml")
    assert len(found) >= 5
    for page, block in found:
        assert isinstance(yaml.safe_load(block), dict), page


@pytest.mark.parametrize("name", PURPOSES)
def test_every_subcommand_has_its_place(name: str) -> None:
    headings = re.findall(r"^## (.+)$", PAGES["command_line.md"], re.MULTILINE)
    assert any(name in re.split(r"\W+(?!harness)", heading) for heading in headings)


def docstrings() -> Iterator[tuple[str, str]]:
    """Every docstring of the package, with its file."""
    for folder in ("grit_lightning", "callbacks", "datamodules"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                    yield path.name, text


def test_no_name_in_angle_brackets_would_be_taken_for_html() -> None:
    texts = [*PAGES.items(), *docstrings()]
    assert len(texts) >= 500
    for name, text in texts:
        words = re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE))
        assert re.findall(r"<[A-Za-z/][^>\n]*>", words) == [], name
