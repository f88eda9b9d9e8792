"""A few real steps of a run and its largest micro-batch, for its time and its memory; nothing of them is kept."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from grit_lightning.cli.settings_only import WRITES_NOTHING, SettingsCLI, quietly
from grit_lightning.planning.live_memory import LiveMemory
from grit_lightning.planning.rehearsal import MicroBatch, bytes_of

WARM_UP = 1
"""First optimizer steps that are not timed: they allocate, and compile kernels."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Measured:
    """What a few steps took.

    Attributes:
        seconds_per_step: Median.
        steps: Number of steps that were timed.
        tensors: Bytes of all tensors alive at the peak of the planned micro-batch.
        device: Bytes that the process took at its peak beyond what it took before the model was loaded: of the GPU what
            torch's allocator handed out, else of resident memory. None where the system does not say.
    """

    seconds_per_step: float
    steps: int
    tensors: int
    device: int | None


def measure(cli: SettingsCLI, steps: int, largest: MicroBatch) -> Measured:
    """Train on the real data for a few steps, on one device, without callbacks, validation or files.

    Then a micro-batch of the planned shape goes forward and backward, so that its memory is measured and not that of the rows
    that happened to come first.

    Args:
        cli: The settings; its model is trained and not to be used afterwards.
        steps: Optimizer steps to time.
        largest: The planned micro-batch.
    """
    watch = _Watch(largest)
    ends = {"max_steps": WARM_UP + steps, "max_epochs": -1, "min_steps": None, "min_epochs": None, "max_time": None}
    nothing_else = {"limit_val_batches": 0, "num_sanity_val_steps": 0, "fast_dev_run": False, "callbacks": [watch]}
    alone = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    with tempfile.TemporaryDirectory() as folder, quietly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run gives them; some are about these few steps only
        settings = {**cli.trainer_settings, **WRITES_NOTHING, **ends, **nothing_else, **alone}
        trainer = Trainer(**{**settings, "default_root_dir": folder})
        trainer.fit(cli.model, datamodule=cli.datamodule)
    return Measured(statistics.median(watch.seconds[WARM_UP:]), steps, watch.tensors, watch.device)


class _Watch(Callback):
    """Times every optimizer step, and looks at the memory of one more micro-batch."""

    def __init__(self, largest: MicroBatch) -> None:
        self.largest = largest
        self.seconds: list[float] = []
        self.tensors = 0
        self.device: int | None = None
        gc.collect()
        self._before = _resident("VmRSS")
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the peak of loading."""
        gc.collect()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        elif _CLEAR.exists():
            _CLEAR.write_text("5", encoding="ascii")  # Linux: VmHWM starts again from what is resident now
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the time, if that was the last micro-batch of an optimizer step."""
        if trainer.global_step == len(self.seconds):
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the planned micro-batch as the next one of the training."""
        module: Any = pl_module
        batch = {name: tensor.to(module.device) for name, tensor in self.largest.content().items()}
        tensors = [*_lasting(trainer, module), *batch.values()]
        memory = LiveMemory(tensors)
        for parameter in module.parameters():
            if parameter.grad is not None:
                memory.follow(parameter.grad)
        with torch.enable_grad(), memory:
            with trainer.precision_plugin.forward_context():
                loss = module.training_step(batch, 0)
            if trainer.accumulate_grad_batches == 1:
                module.zero_grad()
            loss.backward()
            module.on_after_backward()
        self.tensors = bytes_of(tensors) + memory.peak
        self.device = self._peak(module.device)

    def _peak(self, device: torch.device) -> int | None:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        peak = _resident("VmHWM") if _CLEAR.exists() else None
        return None if peak is None or self._before is None else peak - self._before


def _lasting(trainer: pl.Trainer, module: pl.LightningModule) -> list[Tensor]:
    """Tensors that outlive a step: model, statistics, states of the optimizer."""
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    kept = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    geometry: Any = module.geometry
    groups = [] if geometry is None else geometry.groups
    sums = [part for group in groups for part in vars(group.statistics).values() if hasattr(part, "tensors")]
    kept += [tensor for part in sums for tensor in part.tensors()]
    kept += [value for group in groups for value in vars(group.derived).values() if isinstance(value, Tensor)]
    return [*module.parameters(), *module.buffers(), *kept]


def _resident(field: str) -> int | None:
    """Return a field of /proc/self/status in bytes; None where there is no such file."""
    if not _STATUS.exists():
        return None
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
