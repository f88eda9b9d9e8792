"""What a checkpoint of a `GritLitModule` holds, and what it refuses to load."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from peft import PeftConfig
from torch import Tensor

from grit_lightning.fingerprint import require_adapter, require_backbone
from grit_lightning.geometry import RankSpaceGeometry
from grit_lightning.random_state import random_states, restore_random_state

CHECKPOINT_KEY = "grit"
CHECKPOINT_FORMAT = 2


class AdapterState(LightningModule):
    """The saved side of the module: trained parameters, geometry, random numbers, the accumulation window under way.

    The backbone is never part of it. Subclasses set the attributes that are declared here.
    """

    geometry: RankSpaceGeometry | None
    adapter_config: PeftConfig
    _fingerprint: dict[str, Any]
    _resumed: dict[str, Any] | None
    _window_micro_batches: int
    _window_losses: list[Tensor]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # overloaded in torch
        """The trained parameters only: the frozen backbone is never written."""
        trained = self._trained_names()
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the trained parameters; the backbone keeps its own.

        Raises:
            ValueError: If the parameters are not exactly those of this adapter.
        """
        self._check_adapter(state_dict)
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the next step depends on beside Lightning's own, and what tells to whom all of it belongs."""
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
        """The accumulation window under way, with the gradients gathered in it; None between two windows."""
        if self._window_micro_batches == 0:
            return None
        gradients = {name: p.grad.cpu() for name, p in self.named_parameters() if p.grad is not None}
        losses = [loss.cpu() for loss in self._window_losses]
        return {"micro_batches": self._window_micro_batches, "losses": losses, "gradients": gradients}

    def _restore_window(self, window: dict[str, Any] | None) -> None:
        if window is None:
            return
        self._window_micro_batches = window["micro_batches"]
        self._window_losses = [loss.to(self.device) for loss in window["losses"]]
        for name, parameter in self.named_parameters():
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

    def _trained_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}


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
