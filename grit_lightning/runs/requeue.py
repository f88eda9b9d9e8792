"""SLURM's way of going on: a job that is asked to make room has itself put back into the queue."""

from __future__ import annotations

import os
import signal
import subprocess

from lightning.fabric.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]


def requeue_signal(environment: object) -> signal.Signals | None:
    """Return the signal by which SLURM asks this job to make room; None outside SLURM, or if it is not to be requeued.

    Args:
        environment: The Trainer's cluster environment, None if it has none: then the process's own variables count.
    """
    if environment is None and SLURMEnvironment.detect():
        environment = SLURMEnvironment()
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return environment.requeue_signal or signal.SIGUSR1


def requeue() -> str:
    """Put this job back into SLURM's queue, and return one sentence on how that went."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"SLURM job {job} could not be put back into the queue: {error}"
    return f"SLURM job {job} is back in the queue and will go on from there."
