"""When things happen during training: schedules and logging, never the maths."""

from grit_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from grit_lightning.callbacks.base import GeometryCallback
from grit_lightning.callbacks.forgetting import ForgettingProbe
from grit_lightning.callbacks.generation_writer import GenerationWriter
from grit_lightning.callbacks.progress import GeometryProgressBar, ProgressLines
from grit_lightning.callbacks.rank_adaptation import RankAdaptation
from grit_lightning.callbacks.reprojection import Reprojection
from grit_lightning.callbacks.retention import Retention
from grit_lightning.callbacks.run_length import RunLength
from grit_lightning.callbacks.run_record import RunRecord
from grit_lightning.callbacks.spectra import SpectraLogger
from grit_lightning.callbacks.step_timer import StepTimer
from grit_lightning.callbacks.stop_on_signal import StopOnSignal

__all__ = [
    "AdapterCheckpoint",
    "ForgettingProbe",
    "GenerationWriter",
    "GeometryCallback",
    "GeometryProgressBar",
    "ProgressLines",
    "RankAdaptation",
    "Reprojection",
    "Retention",
    "RunLength",
    "RunRecord",
    "SpectraLogger",
    "StepTimer",
    "StopOnSignal",
]
