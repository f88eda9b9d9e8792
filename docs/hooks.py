"""What pages show of the program itself, written when the site is built; a MkDocs hook.

A comment on a line of its own in a page is replaced by what it names:

    <!-- generated: shipped configurations -->
    <!-- generated: grit export --help -->
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this tree, whatever is installed

from grit_lightning.configs import shipped_configs  # noqa: E402

TITLES = {
    "": "Tasks, and data of your own",
    "ablations": "Ablations, to lay over another configuration",
    "models": "Other models, to lay over a task",
    "paper": "The paper's runs",
    "probes": "Probes, to lay over another configuration",
    "retention": "Retention, to lay over another configuration",
    "shared": "What those share, to extend",
    "strategy": "Several processes, to lay over another configuration",
}
"""Headings of the folders of `configs/`."""
_MARK = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)
_OPTIONS_OF_LIGHTNING = "\nCustomize every aspect of training via flags:"
"""From here on the help of a run lists Lightning's Trainer, and what the configuration page has in a better form."""


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Fill in what the page asks for."""

    def written(mark: re.Match[str]) -> str:
        if mark[1] == "shipped configurations":
            return "\n".join(configuration_tables())
        if mark[1].startswith("grit "):
            return f"```text\n{help_of(mark[1])}\n```"
        raise PluginError(f"{page.file.src_uri}: expected something that docs/hooks.py can generate, got {mark[1]!r}.")

    return _MARK.sub(written, markdown)


def configuration_tables() -> Iterator[str]:
    """List the shipped configurations by folder, each with the comment that opens its file."""
    by_folder = sorted(shipped_configs().items(), key=lambda item: (item[0].rpartition("/")[0], item[0]))
    for folder, files in groupby(by_folder, key=lambda item: item[0].rpartition("/")[0]):
        yield from (
            "",
            f"### {TITLES.get(folder, folder)}",
            "",
            "| name | what it is, and how it is run |",
            "|---|---|",
        )
        yield from (f"| `{name}` | {header(path)} |" for name, path in files)
    yield ""


def header(path: Path) -> str:
    """Return the comment that opens a configuration as one cell of a table, with its commands as code."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    cell = ""
    for line in (line.removeprefix("#").removeprefix(" ").replace("|", "\\|") for line in lines):
        words, _, command = line.partition("   " if ":   " in line else "  ")
        command = command.strip()
        cell += f" {words}" + (f" <br>`{command}`<br>" if command else "")
    return re.sub(r"(<br>)+\s*$|^ ", "", re.sub(r"<br>\s+<br>", "<br>", cell))


@cache
def help_of(command: str) -> str:
    """Return what a `grit … --help` says, without Lightning's own options."""
    environment = {**os.environ, "COLUMNS": "88", "NO_COLOR": "1"}
    words = [sys.executable, str(ROOT / "train.py"), *command.split()[1:]]
    said = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if said.returncode != 0:
        raise PluginError(f"`{command}` failed: {said.stderr.strip()}")
    text = re.sub(".\b", "", said.stdout)  # jsonargparse takes back a space
    return text.partition(_OPTIONS_OF_LIGHTNING)[0].strip()
