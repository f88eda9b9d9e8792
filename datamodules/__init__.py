"""One task a file over one shared base."""

from grit_lightning.datamodules.alpaca import AlpacaDataModule
from grit_lightning.datamodules.base import TaskDataModule
from grit_lightning.datamodules.boolq import BoolQDataModule
from grit_lightning.datamodules.dolly import DollyDataModule
from grit_lightning.datamodules.gsm8k import GSM8KDataModule
from grit_lightning.datamodules.mixture import MixtureDataModule
from grit_lightning.datamodules.qnli import QNLIDataModule

__all__ = [
    "AlpacaDataModule",
    "BoolQDataModule",
    "DollyDataModule",
    "GSM8KDataModule",
    "MixtureDataModule",
    "QNLIDataModule",
    "TaskDataModule",
]
