"""Processes that are not there: how many a run would have, and a strategy that lets one stand for the first of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor


class OneOfSeveral(ParallelStrategy):
    """The first of several processes, on a CPU, of which the others are never started.

    Samplers and Lightning's counts see the number of processes; nothing is ever exchanged between them.

    Args:
        processes: How many there would be.
    """

    strategy_name = "one_of_several"

    def __init__(self, processes: int) -> None:
        """Remember the number."""
        super().__init__(parallel_devices=[torch.device("cpu")])
        self.processes = processes

    @property
    def root_device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def world_size(self) -> int:
        """How many processes there would be."""
        return self.processes

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which rows are this process's own."""
        return {"num_replicas": self.processes, "rank": 0}

    def model_to_device(self) -> None:
        """Leave the model where it is."""

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what this process has."""
        return tensor

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return what this process has."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return what this process has decided."""
        return decision

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for nobody."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return what this process has."""
        return obj

    def teardown(self) -> None:
        """Leave everything as it is: nothing was set up."""


def configured_processes(trainer: Mapping[str, Any]) -> int:
    """Return how many processes a run with these arguments of the Trainer would have.

    Devices that are left to Lightning are those of this machine: all its GPUs, or else one process.

    Args:
        trainer: Arguments of the Trainer; `devices`, `accelerator` and `num_nodes` are looked at.
    """
    devices, nodes = trainer.get("devices", "auto"), int(trainer.get("num_nodes") or 1)
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list | tuple):
        return max(len(devices), 1) * nodes
    if str(devices) in ("auto", "-1"):
        gpus = torch.cuda.device_count() if trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") else 0
        return max(gpus, 1) * nodes
    return max(int(devices), 1) * nodes
