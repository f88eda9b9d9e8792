"""One task per file, over one shared base. A new task is exported here by one line, and is then known everywhere."""

from grit_lightning.datamodules.alpaca import AlpacaDataModule as AlpacaDataModule  # `as`: exported
from grit_lightning.datamodules.base import TaskDataModule as TaskDataModule
from grit_lightning.datamodules.boolq import BoolQDataModule as BoolQDataModule
from grit_lightning.datamodules.classification import ClassificationDataModule as ClassificationDataModule
from grit_lightning.datamodules.dolly import DollyDataModule as DollyDataModule
from grit_lightning.datamodules.gsm8k import GSM8KDataModule as GSM8KDataModule
from grit_lightning.datamodules.imdb import IMDbDataModule as IMDbDataModule
from grit_lightning.datamodules.instruction import InstructionDataModule as InstructionDataModule
from grit_lightning.datamodules.mixture import MixtureDataModule as MixtureDataModule
from grit_lightning.datamodules.pipeline.rows import RowsDataModule as RowsDataModule
from grit_lightning.datamodules.qnli import QNLIDataModule as QNLIDataModule
from grit_lightning.datamodules.text import TextDataModule as TextDataModule

TASKS: dict[str, type[TaskDataModule]] = {
    exported.task_name.lower(): exported
    for exported in list(globals().values())
    if isinstance(exported, type) and issubclass(exported, TaskDataModule) and exported.hub_id
}
"""Every task that has published data, by its name in lower case."""
