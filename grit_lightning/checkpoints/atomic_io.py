"""Lightning's checkpoint input and output, made safe: a file is whole or not there, and reading one runs no code in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer

from grit_lightning.checkpoints.reading import read_checkpoint
from grit_lightning.runs.atomic import write_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints with `grit_lightning.runs.atomic`. Remote paths (`s3://…`) are left to Lightning."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What Lightning has gathered.
            path: Final name; missing folders are created.
            storage_options: Must be None, as in Lightning's own.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        write_file(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: Its file.
            map_location: As in `torch.load`.
            weights_only: Only False allows a file that runs code when it is read.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or not a checkpoint.
        """
        if weights_only is False or "://" in str(path):
            content: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
            return content
        return read_checkpoint(Path(path), map_location=map_location, mmap=False)


def make_atomic(trainer: Trainer) -> None:
    """Replace Lightning's default way of writing checkpoints; keep one that the user chose."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
