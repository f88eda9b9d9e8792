"""Reads and writes the tables of docs/compatibility.md; the prose around them is written by hand."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from .cases import REFUSED, WITHOUT_GEOMETRY, Outcome

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
LOCK = Path(tempfile.gettempdir()) / "grit-compatibility.lock"
LIBRARIES = ("torch", "lightning", "transformers", "peft", "bitsandbytes")
HEADER = "| | training | export | what is said, or left out |\n|---|---|---|---|\n"
_MADE_WITH = r"^Made with .*\.$"


def rows(section: str) -> dict[str, Outcome]:
    """Return the rows of a section by name, in their order."""
    lines = _sections()[section].splitlines()
    split = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("| "))
    return {name: Outcome(*others) for name, *others in split if name}


def titles() -> list[str]:
    """Return the headings of the tables."""
    return list(_sections())[1:]


def write_row(section: str, names: Sequence[str], name: str, found: Outcome) -> None:
    """Put one row into its table, in the order of `names`; rows of other names leave the page.

    Args:
        section: Heading of the table; the prose under it stays.
        names: All rows that the table should have.
        name: The row.
        found: What came of it.
    """
    with FileLock(LOCK):  # several processes write
        table = rows(section) | {name: found}
        lines = [f"| {each} | {cells(table[each])} |\n" for each in names if each in table]
        parts = _sections()
        prose = "".join(line for line in parts[section].splitlines(keepends=True) if not line.startswith("|"))
        parts[section] = f"{prose.rstrip()}\n\n{HEADER}{''.join(lines)}\n".lstrip("\n")
        parts[""] = re.sub(_MADE_WITH, made_with(), parts[""], flags=re.MULTILINE)
        page = "".join(f"## {title}\n\n{text}" if title else text for title, text in parts.items())
        new = PAGE.with_suffix(".new")
        new.write_text(page.rstrip() + "\n", encoding="utf-8")
        new.replace(PAGE)  # at once: other processes read it


def _sections() -> dict[str, str]:
    """Return the text of the page by heading; what stands before the first one under the empty name."""
    before, *others = re.split(r"^## (.+)\n\n?", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {"": before} | dict(zip(others[::2], others[1::2], strict=True))


def cells(found: Outcome) -> str:
    return f"{found.status} | {found.export} | {found.words}"


def made_with() -> str:
    """Return the line that names the versions of the libraries here."""
    return f"Made with {', '.join(f'{name} {version(name)}' for name in LIBRARIES)}."


def comparable(found: Outcome) -> tuple[str, ...]:
    """Return what must be the same here as on the page.

    With the libraries that the page was made with, that is the row, but for numbers. With others it is the status, and of a
    refusal the setting and what was expected.
    """
    if made_with() in PAGE.read_text(encoding="utf-8"):
        return (found.status, found.export, re.sub(r"-?\d[\d.e+%-]*", "N", found.words))
    refused = found.status in (REFUSED, WITHOUT_GEOMETRY)
    return (found.status, found.words.partition(", got")[0] if refused else "")
