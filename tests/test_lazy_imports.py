"""`import grit_lightning` is cheap, and nobody notices otherwise.

It imports no torch; what is exported is there by attribute and by import; a noise of bitsandbytes is gone. That subpackages are
there by attribute too shows only in a new process: test_packaging.py has one.
"""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import grit_lightning

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "jsonargparse")


def imports(statement: str) -> set[str]:
    """Top-level modules that a new process has imported after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)}
    )
    return set(shown.stdout.split())


@pytest.mark.parametrize(
    "statement",
    ["import grit_lightning", "import grit_lightning.cli", "import grit_lightning.configs; dir(grit_lightning)"],
)
def test_importing_the_package_imports_nothing_heavy(statement: str) -> None:
    assert not imports(statement) & {*HEAVY}


def test_what_is_exported_is_there_by_attribute_and_listed() -> None:
    assert set(grit_lightning.__all__) <= set(dir(grit_lightning))
    for name in grit_lightning.__all__:
        assert getattr(grit_lightning, name) is not None
    assert grit_lightning.GritLitModule is importlib.import_module("grit_lightning.module").GritLitModule
    with pytest.raises(AttributeError, match="module 'grit_lightning' has no attribute 'nonesuch'"):
        _ = grit_lightning.nonesuch


def test_the_missing_kernel_is_not_mentioned() -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    said = [
        logger.makeRecord(logger.name, logging.WARNING, "", 0, text, (), None)
        for text in (
            "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'.",
            "something else",
        )
    ]
    assert [bool(logger.filter(record)) for record in said] == [False, True]
