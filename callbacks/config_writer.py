"""config.yaml: the settings of a run, in a form that `--config` reads."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_only

from grit_lightning.runs.atomic import write_text


class ConfigWriter(Callback):
    """Writes the settings of a run to a file, and knows whether training has begun.

    Evaluating a run does not replace the settings that it was trained with, nor does resuming it before its checkpoint
    has been accepted. Only rank zero writes.

    Attributes:
        training_began: Whether every check has passed and a first batch was next.
    """

    def __init__(self, path: Path | None, text: str) -> None:
        """Keep path and text.

        Args:
            path: Where to write; None writes nothing.
            text: The settings as YAML.
        """
        self.path = path
        self.text = text
        self.training_began = False

    @rank_zero_only
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file."""
        if self.path is not None and not self.path.exists():
            write_text(self.path, self.text)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the work has begun, with these settings."""
        self.training_began = True
        if self.path is not None and trainer.is_global_zero:
            write_text(self.path, self.text)
