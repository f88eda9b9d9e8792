"""What a checkpoint of a `GritLitModule` holds, and what it refuses to load."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from peft import PeftConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from grit_lightning.backbones.fingerprint import require_adapter, require_backbone
from grit_lightning.checkpoints.random_state import random_states, restore_random_state
from grit_lightning.distributed.collectives import process_count, sum_over_processes
from grit_lightning.geometry.rank_space import RankSpaceGeometry

CHECKPOINT_KEY = "grit"
CHECKPOINT_FORMAT = 3
SUPPORTED = ("ddp", "grit_fsdp", "grit_fsdp2")
"""Strategies for several processes, by their registered names."""
WRAPPERS = (
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
)  # what sharding and compiling put into names


class AdapterState(LightningModule):
    """The saved side of the module: trained parameters, geometry, random numbers, the accumulation window under way.

    The backbone is never part of it, and the adapter is whole on every process, so that a checkpoint is one file of one
    form, whatever strategy and number of processes it was written under. Subclasses set the attributes declared here.
    """

    geometry: RankSpaceGeometry | None
    adapter_config: PeftConfig
    _fingerprint: dict[str, Any]
    _resumed: dict[str, Any] | None
    _window_micro_batches: int
    _window_losses: list[Tensor]

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # overloaded in torch
        """The trained parameters only: the frozen backbone is never written.

        Raises:
            ValueError: If one of them is not whole, so that a part would pass for all of it.
        """
        trained = self._trained()
        for name, parameter in trained.items():
            factor = ".lora_A." in name or ".lora_B." in name
            if isinstance(parameter, DTensor) or parameter.numel() == 0 or (factor and parameter.ndim < 2):
                raise ValueError(
                    f"The adapter's {name} is a {type(parameter).__name__} of shape {tuple(parameter.shape)} on this process, "
                    "a shard and not the whole. Set trainer.strategy to one that keeps the adapter whole: "
                    f"{', '.join(SUPPORTED)}."
                )
        return {prefix + name: p if keep_vars else p.detach() for name, p in trained.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the trained parameters; the backbone keeps its own.

        Raises:
            ValueError: If the parameters are not exactly those of this adapter.
        """
        self._check_adapter(state_dict)
        for name, parameter in self._trained().items():
            parameter.copy_(state_dict[name])
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the next step depends on beside Lightning's own, and what tells to whom all of it belongs; a collective."""
        checkpoint[CHECKPOINT_KEY] = {
            "format_version": CHECKPOINT_FORMAT,
            "backbone": self._fingerprint,
            "adapter": plain(self.adapter_config.to_dict()),
            "geometry": None if self.geometry is None else self.geometry.state_dict(),
            "ranks": None if self.geometry is None else self.geometry.ranks,
            "random": random_states(self.device),
            "window": self._window_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits this model, and only then restore the geometry.

        Raises:
            ValueError: If the checkpoint is not one of this class, of another format version, backbone or adapter.
        """
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is None or saved["format_version"] != CHECKPOINT_FORMAT:
            found = "no such entry" if saved is None else f"version {saved['format_version']}"
            raise ValueError(f"Expected a GRIT checkpoint of format version {CHECKPOINT_FORMAT}, found {found}.")
        require_backbone(saved["backbone"], self._fingerprint)
        require_adapter(saved["adapter"], plain(self.adapter_config.to_dict()))
        self._check_adapter(checkpoint["state_dict"])
        if self.geometry is not None and saved["geometry"] is not None:
            self.geometry.load_state_dict(saved["geometry"])
        self._resumed = {"random": saved["random"], "window": saved["window"]}
        _count_batches_anew(checkpoint, len(saved["random"]), process_count())

    def on_train_start(self) -> None:
        """On resume, put random numbers and an unfinished accumulation window back; nothing draws from here to the batch."""
        resumed, self._resumed = self._resumed, None
        if resumed is None or self.trainer.ckpt_path is None:
            return
        self._restore_window(resumed["window"])
        states = resumed["random"]
        if len(states) == self.trainer.world_size:
            restore_random_state(states[self.global_rank], self.device)

    def _window_state(self) -> dict[str, Any] | None:
        """The accumulation window under way, with the gradients gathered in it; None between two windows.

        Gradients are the means over all processes, to which they add up to the same mean as those of each process would.
        """
        if self._window_micro_batches == 0:
            return None
        names = [name for name, p in self._trained().items() if p.grad is not None]
        gradients = [self._trained()[name].grad.clone() for name in names]  # type: ignore[union-attr]
        sum_over_processes(gradients)
        torch._foreach_div_(gradients, process_count())
        losses = [loss.cpu() for loss in self._window_losses]
        means = {name: gradient.cpu() for name, gradient in zip(names, gradients, strict=True)}
        return {"micro_batches": self._window_micro_batches, "losses": losses, "gradients": means}

    def _restore_window(self, window: dict[str, Any] | None) -> None:
        if window is None:
            return
        self._window_micro_batches = window["micro_batches"]
        self._window_losses = [loss.to(self.device) for loss in window["losses"]]
        for name, parameter in self._trained().items():
            if name in window["gradients"]:
                parameter.grad = window["gradients"][name].to(parameter.device)

    def _check_adapter(self, state: Mapping[str, Tensor]) -> None:
        expected = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if expected != found:
            different = sorted(set(expected.items()) ^ set(found.items()))
            raise ValueError(
                f"The checkpoint's adapter does not fit this model: {len(different)} parameters differ, first {different[:2]}. "
                "Use the backbone and adapter configuration that the checkpoint was trained with."
            )

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters by the names that they have on a single process."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return {_unwrapped_name(name): parameter for name, parameter in named}


def _count_batches_anew(checkpoint: dict[str, Any], before: int, now: int) -> None:
    """Turn Lightning's numbers of micro-batches a process into those of another number of processes."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = loops.get("epoch_loop.batch_progress", {})
    for counts in (progress.get("total", {}), progress.get("current", {})):
        if counts:  # the differences between them say where in a micro-batch the run is
            shift = counts["ready"] * before // now - counts["ready"]
            counts.update({name: count + shift for name, count in counts.items()})


def _unwrapped_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def plain(value: Any) -> Any:
    """Turn sets, tuples, enums and dataclasses into what YAML and weights_only checkpoints can hold."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if hasattr(value, "value"):
        return value.value
    return value
