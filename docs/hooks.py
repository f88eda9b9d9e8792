"""What pages show of the program itself, written when the site is built; a MkDocs hook.

A comment on a line of its own in a page is replaced by what it names:

    <!-- generated: shipped configurations -->
    <!-- generated: grit export --help -->
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this tree, whatever is installed

from grit_lightning.cli.program import COMMANDS, overview  # noqa: E402
from grit_lightning.configs import shipped_configs  # noqa: E402

_MARK = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)
_COLUMNS = "100"
TITLES = {
    "": "Tasks",
    "ablations": "Ablations, to lay over another configuration",
    "models": "Other models, to lay over a task",
    "paper": "The paper's runs",
    "probes": "Probes, to lay over another configuration",
    "shared": "What those share, to extend",
    "strategy": "Many processes, to lay over another configuration",
}
"""Headings of the folders of `configs/`."""


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Fill in what the page asks for."""

    def written(mark: re.Match[str]) -> str:
        name = mark[1]
        if name == "shipped configurations":
            return "\n".join(configuration_tables())
        if name == "grit --help" or (name.startswith("grit ") and name.split()[1] in COMMANDS):
            return f"```text\n{help_of(name)}```"
        raise PluginError(f"{page.file.src_uri}: expected something that docs/hooks.py can generate, got {name!r}.")

    return _MARK.sub(written, markdown)


def configuration_tables() -> Iterator[str]:
    """List the shipped configurations by folder, each with the first paragraph and the commands of its header."""
    by_folder = sorted(shipped_configs().items(), key=lambda item: (item[0].rpartition("/")[0], item[0]))
    for folder, files in groupby(by_folder, key=lambda item: item[0].rpartition("/")[0]):
        yield from ("", f"### {TITLES[folder]}", "", "| name | what it is, and how it is run |", "|---|---|")
        for name, path in files:
            about, commands = header(path)
            yield f"| `{name}` | {' '.join([about, *(f'<br>`{command}`' for command in commands)])} |"
    yield ""


def header(path: Path) -> tuple[str, list[str]]:
    """Split the comment that opens a configuration into its text and its indented commands."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    comment = [line.removeprefix("#").removeprefix(" ").rstrip() for line in lines]
    paragraphs = [list(group) for filled, group in groupby(comment, key=bool) if filled]
    about = " ".join(line for line in paragraphs[0])
    commands = [line.strip() for paragraph in paragraphs for line in paragraph if line.startswith("  ")]
    return about.replace("|", "\\|"), [command.replace("|", "\\|") for command in commands]


def help_of(command: str) -> str:
    """Return what a `grit … --help` says."""
    if command == "grit --help":
        return overview()
    said = io.StringIO()
    words = command.split()
    with patch.dict(os.environ, COLUMNS=_COLUMNS, NO_COLOR="1"), redirect_stdout(said):
        try:
            COMMANDS[words[1]](words[2:])
        except SystemExit:  # argparse leaves after the help
            pass
    return said.getvalue()
