"""When things happen during training: schedules and logging, never the maths."""

from grit_lightning.callbacks.progress import GeometryProgressBar
from grit_lightning.callbacks.run_record import RunRecord
from grit_lightning.callbacks.step_timer import StepTimer

__all__ = ["GeometryProgressBar", "RunRecord", "StepTimer"]
