"""What a checkpoint of a `GritLitModule` holds besides Lightning's own content, and when it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grit_lightning.accumulation_window import AccumulationWindow
from grit_lightning.backbones.fingerprint import require_adapter, require_backbone
from grit_lightning.backbones.moved_start import require_start
from grit_lightning.checkpoints.adapter_state import require_same_parameters
from grit_lightning.checkpoints.random_state import random_state, restore_random_state
from grit_lightning.checkpoints.reading import CHECKPOINT_FORMAT, CHECKPOINT_KEY, grit_entry
from grit_lightning.distributed.collectives import gather_objects, process_count
from grit_lightning.geometry.rank_space import RankSpaceGeometry


@dataclass
class CheckpointPacker:
    """Packs into a checkpoint what the next optimizer step depends on: geometry, random numbers, the current window.

    The backbone is never part of it, and the adapter is whole on every process, so a checkpoint is a single file in the same
    format, whatever strategy and number of processes wrote it. It also describes backbone and adapter, so that a checkpoint
    of another model is refused before anything is loaded from it.

    Attributes:
        backbone: Fingerprint of the backbone, see `backbones.fingerprint`.
        adapter: PEFT's configuration in plain values.
        start: A₀ and B₀ of a start that moved the backbone, see `backbones.moved_start`; empty for other adapters.
        geometry: The geometry, or None without one.
        window: The accumulation window.
    """

    backbone: dict[str, Any]
    adapter: dict[str, Any]
    start: dict[str, Tensor]
    geometry: RankSpaceGeometry | None
    window: AccumulationWindow
    _unpacked: dict[str, Any] | None = field(default=None, init=False)

    def pack(self, checkpoint: dict[str, Any], trained: Mapping[str, nn.Parameter], device: torch.device) -> None:
        """Add our entry to a checkpoint; a collective.

        Args:
            checkpoint: What Lightning has gathered.
            trained: The trained parameters, by name.
            device: Device whose random numbers are kept, besides those of the CPU.
        """
        checkpoint[CHECKPOINT_KEY] = {
            "format_version": CHECKPOINT_FORMAT,
            "backbone": self.backbone,
            "adapter": self.adapter,
            "start": self.start,
            "geometry": None if self.geometry is None else self.geometry.state_dict(),
            "ranks": None if self.geometry is None else self.geometry.ranks,
            "random": gather_objects(random_state(device)),
            "window": self.window.state_dict(trained),
        }

    def unpack(self, checkpoint: dict[str, Any], adapter: Mapping[str, Tensor]) -> None:
        """Check that a checkpoint fits this model, and only then restore the geometry. `resume` restores the rest.

        Args:
            checkpoint: The whole checkpoint; Lightning's counts in it are converted to this number of processes.
            adapter: The tensors that the state holds, by name.

        Raises:
            ValueError: If the checkpoint is not from a `GritLitModule`, or has another format version, backbone or adapter.
        """
        saved = grit_entry(checkpoint)
        require_backbone(saved["backbone"], self.backbone)
        require_adapter(saved["adapter"], self.adapter)
        require_same_parameters(adapter, checkpoint["state_dict"])
        require_start(saved.get("start", {}), self.start)
        if self.geometry is not None and saved["geometry"] is not None:
            self.geometry.load_state_dict(saved["geometry"])
        self._unpacked = {"random": saved["random"], "window": saved["window"]}
        _count_batches_anew(checkpoint, len(saved["random"]), process_count())

    def resume(self, trained: Mapping[str, nn.Parameter], device: torch.device, rank: int) -> None:
        """Restore random numbers and an unfinished window from the last `unpack`; only once.

        Call it when nothing will draw another random number before the next batch. If the number of processes has changed,
        each keeps its own random numbers.

        Args:
            trained: The trained parameters, by name.
            device: Where the model is.
            rank: Rank of this process.
        """
        unpacked, self._unpacked = self._unpacked, None
        if unpacked is None:
            return
        self.window.load_state_dict(unpacked["window"], trained, device)
        if len(unpacked["random"]) == process_count():
            restore_random_state(unpacked["random"][rank], device)


def _count_batches_anew(checkpoint: dict[str, Any], before: int, now: int) -> None:
    """Convert Lightning's counts of micro-batches per process to another number of processes."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = loops.get("epoch_loop.batch_progress", {})
    for counts in (progress.get("total", {}), progress.get("current", {})):
        if counts:  # the differences between them say how far into a micro-batch the run is
            shift = counts["ready"] * before // now - counts["ready"]
            counts.update({name: count + shift for name, count in counts.items()})
