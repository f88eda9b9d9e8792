"""The `grit` program."""

from grit_lightning.cli.program import main

__all__ = ["main"]
