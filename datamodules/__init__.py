"""One task a file over one shared base."""

from grit_lightning.datamodules.base import TaskDataModule
from grit_lightning.datamodules.boolq import BoolQDataModule

__all__ = ["BoolQDataModule", "TaskDataModule"]
