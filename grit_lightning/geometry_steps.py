"""What a training loop calls so that the geometry of a PEFT model is measured, used and saved. It needs no Trainer.

`GeometryHooks` is this for the hooks of a LightningModule; `examples/hf_trainer.py` is this for another Trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from grit_lightning.accumulation_window import AccumulationWindow, ClosedWindow
from grit_lightning.backbones.origin import AdapterOrigin, backbone_tensors
from grit_lightning.checkpoints.adapter_state import (
    adapter_names,
    load_saved_state,
    plain_name,
    require_separate,
    saved_state,
    saved_tensors,
    trained_parameters,
)
from grit_lightning.checkpoints.packing import CheckpointPacker
from grit_lightning.checkpoints.plain_values import to_plain_values
from grit_lightning.checkpoints.reading import CHECKPOINT_KEY
from grit_lightning.errors import InvalidValueError
from grit_lightning.geometry.audibility import settle_layers
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.optimizer_state import AveragesWeights
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.optimizers import GeometryAdam
from grit_lightning.rank_allocation import RankAllocation

ALLOCATION_KEY = "rank_allocation"
"""Entry of a checkpoint for the state of AdaLoRA's allocator."""

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


class GeometrySteps:
    """The steps of a training loop around a PEFT model.

        steps = GeometrySteps(model, GeometryConfig())
        optimizer = steps.connect(EigenbasisAdam(parameters))
        for batch in batches:                                      # one a window; see `accumulate` for more
            steps.start_micro_batch(batch["attention_mask"], label_tokens)
            steps.take_loss(loss_of(model, batch)).backward()
            steps.finish_micro_batch()
            steps.before_optimizer_step()                          # before gradients are clipped
            optimizer.step()
            optimizer.zero_grad()

    Args:
        model: The model, its adapter attached.
        config: Settings of the geometry, or None to train the plain adapter.
        owner: Module that the model is a part of, all of whose trained parameters are saved; None for the model itself.
        origin: What the adapter was attached to; None reads it off the model, which must not have been trained yet.

    Attributes:
        geometry: The geometry, or None without one.
        window: The accumulation window under way.
        allocation: AdaLoRA's, or None.
        optimizer: The connected optimizer.

    Raises:
        TypeError: If the model is no `PeftModel`.
        ValueError: If its adapter cannot be followed.
    """

    def __init__(
        self,
        model: PeftModel,
        config: GeometryConfig | None = GeometryConfig(),  # noqa: B008 (frozen)
        *,
        owner: nn.Module | None = None,
        origin: AdapterOrigin | None = None,
    ) -> None:
        """Find the layers and register the hooks that measure."""
        self.origin = origin or AdapterOrigin.of(model)
        self.model = model
        self.owner = owner or model
        self.geometry = None if config is None else RankSpaceGeometry(model, config)
        self.allocation = RankAllocation.of(model)
        self.window = AccumulationWindow()
        self.optimizer: Any = None
        adapter = to_plain_values(self.origin.adapter)
        start = dict(self.origin.start)
        self.packer = CheckpointPacker(dict(self.origin.fingerprint), adapter, start, self.geometry, self.window)
        if self.origin.backbone is not None:
            _ = self.saved_names  # now: buffers are others once the model has moved
        self._learns: Tensor | None = None
        self._settled = config is None or config.silent_layers == "refuse"

    @cached_property
    def saved_names(self) -> frozenset[str]:
        """Names in the owner of what a checkpoint holds: all but the frozen backbone. Asked for once the owner is complete."""
        backbone = self.origin.backbone
        names = adapter_names(self.owner, backbone_tensors(self.model) if backbone is None else backbone)
        require_separate(saved_tensors(self.owner, names))
        return names

    @property
    def prefix(self) -> str:
        """What stands before the model's own names in the owner's."""
        path = next((name for name, module in self.owner.named_modules() if module is self.model), None)
        if path is None:
            raise InvalidValueError(
                f"model: expected an attribute of the {type(self.owner).__name__}, whose checkpoints hold it, got none. Set it "
                "there, as in `self.model = model`."
            )
        return f"{path}." if path else ""

    @property
    def device(self) -> torch.device:
        """Where the adapter is."""
        adapter = next(p for p in self.model.parameters() if p.requires_grad)
        return torch.device(adapter.device)

    # Before training.

    def settle_layers(self, loss: Callable[[], Tensor], tokens: int) -> None:
        """Find out by one pass over a few tokens which layers can be heard, see `geometry.audibility`.

        Args:
            loss: Runs the model over a batch without padding and returns its loss.
            tokens: Tokens of that batch.

        Raises:
            ValueError: If layers cannot be heard and are not to be left out, or no layer would be left.
        """
        if self.geometry is not None:
            settle_layers(self.geometry, self.model, loss, tokens)
        self._settled = True

    def connect(self, optimizer: OptimizerT) -> OptimizerT:
        """Make the one optimizer of the training known, and give it the geometry if it takes its curvature from there.

        Raises:
            MisconfigurationException: If the optimizer needs a geometry and there is none.
            ValueError: If silent layers are to be left out, and nothing has looked for them.
        """
        if not self._settled:
            raise InvalidValueError(
                "GeometryConfig.silent_layers: expected refuse where nothing looks for such layers before training, got "
                "leave_out. Call settle_layers before connect, or leave these layers out of target_modules."
            )
        if isinstance(optimizer, GeometryAdam):
            if self.geometry is None:
                raise MisconfigurationException(
                    f"model.geometry: expected a GeometryConfig, which {type(optimizer).__name__} needs, got null. Set it, or "
                    "set model.optimizer to torch.optim.AdamW."
                )
            optimizer.bind(self.geometry)
        if self.geometry is not None:
            self.geometry.to(self.device)
        optimizer.register_step_post_hook(self._after_optimizer_step)
        if self.allocation is not None:
            optimizer.register_step_post_hook(self.allocation.after_step)
        self.optimizer = optimizer
        return optimizer

    # A micro-batch.

    # An optimizer that averages weights, such as schedule-free ones, is at its average everywhere but within a window, so that
    # callbacks, validation and checkpoints all see the same weights, and whether they look changes no bit of the training.

    def start_micro_batch(
        self,
        token_mask: Tensor,
        label_tokens: Tensor | float,
        *,
        accumulate: int = 1,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Begin to listen: call before the forward pass.

        Args:
            token_mask: `[B, T]`, non-zero where a token is real.
            label_tokens: How many tokens the loss is a mean over; 1 for a sum over tokens, 0 if there is nothing to learn.
            accumulate: What the loss is divided by before the backward pass, where several micro-batches make a step.
            scaler: Of 16-bit training, multiplies the loss.
        """
        self.go_to_gradients()
        tokens = torch.as_tensor(label_tokens, device=token_mask.device)
        self._learns = tokens > 0
        if self.geometry is None:
            return
        loss_scale = torch.full((), 1.0 / accumulate, dtype=torch.float32, device=token_mask.device)
        if scaler is not None:
            loss_scale = scaler.scale(loss_scale)
        self.geometry.start_micro_batch(
            token_mask,
            torch.where(self._learns, tokens, torch.ones_like(tokens)) / loss_scale,
            loss_scale if self.geometry.config.regularised else None,
        )

    def take_loss(self, loss: Tensor) -> Tensor:
        """Return the loss for the backward pass, 0 where there was nothing to learn, and keep it to be checked.

        Raises:
            RuntimeError: Without `start_micro_batch` before.
        """
        learns, self._learns = self._learns, None
        if learns is None:
            raise RuntimeError(
                "take_loss: expected start_micro_batch before the forward pass, got none, so that no statistics were taken. "
                "Call both for every micro-batch."
            )
        loss = torch.where(learns, loss, torch.zeros_like(loss))  # the mean of nothing is NaN, its gradient 0
        self.window.add_loss(loss, learns)
        return loss

    def finish_micro_batch(self) -> None:
        """Close the micro-batch: call after the backward pass."""
        self.window.finish_micro_batch()
        if self.geometry is not None:
            self.geometry.finish_micro_batch()

    # An optimizer step.

    @torch.no_grad()
    def before_optimizer_step(self, *, accumulate: int = 1, step: int = 0, scaled: bool = False) -> ClosedWindow:
        """Check the window, and precondition its gradients: call before they are clipped.

        By now all processes share the gradients, and a scaler has been undone.

        Args:
            accumulate: What the losses were divided by; gradients of fewer micro-batches are scaled up to that.
            step: Number of the optimizer step, for messages.
            scaled: Whether a gradient scaler will skip a step whose gradients are not finite.

        Raises:
            FloatingPointError: If the loss or gradient of the window is not finite; the weights are those of the last step.
            ValueError: If no micro-batch of the window had a label token.
            RuntimeError: If something was not called before.
        """
        if self.optimizer is None:
            raise RuntimeError("before_optimizer_step: expected an optimizer, got none. Call connect(optimizer) first.")
        gradients = [p.grad for p in self.owner.parameters() if p.grad is not None]
        closed = self.window.close(gradients, accumulate, step=step, scaled=scaled)
        if not closed.finite:  # the scaler will skip this step, and with it what comes after
            self.go_to_average()
        if self.geometry is not None:
            if closed.finite:
                self.geometry.step(precondition=not isinstance(self.optimizer, GeometryAdam))
            else:
                self.geometry.discard_window()
        return closed

    def _after_optimizer_step(self, *_: Any) -> None:
        """Go to the average, if the optimizer averages weights, and stay within the ranks."""
        if self.window.micro_batches > 0:
            raise RuntimeError(
                "optimizer.step: expected before_optimizer_step before it, got none, so that the step took no notice of the "
                "geometry. Call it when the gradients are complete, in on_before_optimizer_step of a LightningModule."
            )
        self.go_to_average()
        if self.geometry is not None:
            self.geometry.hold_ranks()

    def go_to_gradients(self) -> None:
        """Go to the weights where gradients are to be taken, if the optimizer averages weights."""
        if isinstance(self.optimizer, AveragesWeights):
            self.optimizer.train()

    def go_to_average(self) -> None:
        """Go to the weights to be evaluated, if the optimizer averages weights; also in the middle of a window."""
        if isinstance(self.optimizer, AveragesWeights):
            self.optimizer.eval()

    # Checkpoints.

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint what the next step depends on, and take the frozen backbone out; a collective.

        The optimizer, the schedule, the position in the data and the state of callbacks are saved by whoever has them.

        Args:
            checkpoint: Its `state_dict`, if there is one, holds the owner's tensors by name.
        """
        self.packer.pack(checkpoint, trained_parameters(self.owner), self.device)
        state = checkpoint.get("state_dict")
        if state is None:
            state = saved_state(self.owner, self.saved_names)
        named = {plain_name(name): value for name, value in state.items()}
        checkpoint["state_dict"] = {name: value for name, value in named.items() if name in self.saved_names}
        checkpoint[CHECKPOINT_KEY]["model"] = {"prefix": self.prefix, **self.origin.source}
        if self.allocation is not None:
            checkpoint[ALLOCATION_KEY] = self.allocation.state_dict()

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint fits this model, and only then restore the adapter and the geometry.

        Raises:
            ValueError: If it has no entry of ours, or another format version, backbone or adapter.
        """
        self.packer.unpack(checkpoint, saved_tensors(self.owner, self.saved_names))
        load_saved_state(self.owner, self.saved_names, checkpoint["state_dict"])
        if self.allocation is not None:
            self.allocation.load_state_dict(checkpoint.get(ALLOCATION_KEY))

    def resume(self, rank: int = 0) -> None:
        """Restore random numbers and an unfinished window of the checkpoint last loaded, when nothing draws before a batch.

        Args:
            rank: Of this process.
        """
        self.packer.resume(trained_parameters(self.owner), self.device, rank)
