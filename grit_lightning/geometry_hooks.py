"""`GeometrySteps` under the names of a LightningModule's hooks, with what they need taken from its Trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from grit_lightning.accumulation_window import ClosedWindow
from grit_lightning.backbones.origin import AdapterOrigin
from grit_lightning.checkpoints.adapter_state import expect_no_backbone
from grit_lightning.distributed.strategies import require_supported
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.geometry_steps import GeometrySteps, OptimizerT
from grit_lightning.optimization import require_usable, steps_of_the_run, warn_of_settings


class GeometryHooks:
    """Gives any LightningModule that owns a PEFT model the geometry, its callbacks and its checkpoints.

    The module keeps it, keeps its `geometry` under that name, where callbacks look for it, and calls it in its hooks; see
    docs/own_module.md:

        self.hooks = GeometryHooks(self, self.model, GeometryConfig())
        self.geometry = self.hooks.geometry

    Args:
        module: The LightningModule, trained by automatic optimization with one optimizer.
        model: Its PEFT model.
        config: Settings of the geometry, or None to train the plain adapter.
        origin: As in `GeometrySteps`.

    Attributes:
        steps: What it calls.

    Raises:
        TypeError: If the model is no `PeftModel`.
        ValueError: If its adapter cannot be followed.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        model: PeftModel,
        config: GeometryConfig | None = GeometryConfig(),  # noqa: B008 (frozen)
        *,
        origin: AdapterOrigin | None = None,
    ) -> None:
        """Find the layers and register the hooks that measure."""
        self.steps = GeometrySteps(model, config, owner=module, origin=origin)
        self._module = module
        self._loaded = False
        if type(module).state_dict is nn.Module.state_dict:  # which asks for the whole backbone when it is loaded
            module.register_load_state_dict_post_hook(self._expect_no_backbone)  # type: ignore[no-untyped-call]

    @property
    def geometry(self) -> RankSpaceGeometry | None:
        """The geometry, or None without one."""
        return self.steps.geometry

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self._module.trainer.precision_plugin, "scaler", None)

    # Before training.

    def connect(self, optimizer: OptimizerT) -> OptimizerT:
        """In `configure_optimizers`: make the optimizer known, and give it the geometry if it asks for one; return it.

        Raises:
            MisconfigurationException: If the Trainer, the module or the optimizer cannot serve the geometry.
        """
        if not self._module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self._module).__name__}.automatic_optimization: expected True, so that the Trainer says what the loss "
                "is divided by, got False. Set it to True, or call GeometrySteps in your own loop."
            )
        if self._module._trainer is not None:
            require_supported(self._module.trainer.strategy)
            require_usable(optimizer, self._module.trainer)
        return self.steps.connect(optimizer)

    def on_train_start(self) -> None:
        """Say which settings act on nothing in this run; on resume, restore random numbers and an unfinished window.

        The length of the run is asked for here and not before: that loads the data, and Lightning gives a loader its place back
        only if it is loaded after the checkpoint. Nothing draws random numbers between here and the first batch.

        Raises:
            ValueError: If the run is too short for AdaLoRA's schedule.
            RuntimeError: If the Trainer has loaded a checkpoint of which `on_load_checkpoint` was not told.
        """
        trainer = self._module.trainer
        if self.steps.allocation is not None:
            self.steps.allocation.require_steps(steps_of_the_run(trainer))
        warn_of_settings(trainer, None if self.geometry is None else self.geometry.config)
        if trainer.ckpt_path is None:  # a module from `load_from_checkpoint` is trained anew
            return
        if not self._loaded:
            raise RuntimeError(
                f"{type(self._module).__name__}.on_load_checkpoint: expected a call of the hooks' method of that name, got "
                "none: the geometry would begin anew. Call hooks.on_load_checkpoint(checkpoint) there."
            )
        self.steps.resume(self._module.global_rank)

    # Steps.

    def start_micro_batch(self, token_mask: Tensor, label_tokens: Tensor | float) -> None:
        """In `training_step`, before the forward pass.

        Args:
            token_mask: `[B, T]`, non-zero where a token is real.
            label_tokens: How many tokens the loss is a mean over; 1 for a sum over tokens, 0 if there is nothing to learn.

        Raises:
            RuntimeError: If the Trainer's optimizer is not connected.
        """
        self._require_connected(self._module.trainer.optimizers)
        accumulate = self._module.trainer.accumulate_grad_batches
        self.steps.start_micro_batch(token_mask, label_tokens, accumulate=accumulate, scaler=self._scaler)

    def take_loss(self, loss: Tensor) -> Tensor:
        """In `training_step`, at its end: return the loss, 0 where there was nothing to learn, and keep it to be checked."""
        return self.steps.take_loss(loss)

    def on_train_batch_start(self) -> None:
        """Go where an optimizer that averages weights takes its gradients; it wants to be there when its step begins."""
        self.steps.go_to_gradients()

    def on_after_backward(self) -> None:
        """Close the micro-batch."""
        self.steps.finish_micro_batch()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> ClosedWindow:
        """Precondition the accumulated gradients, which all processes now share, before they are clipped.

        Returns:
            The losses of the window on this process, and whether its gradients are finite.

        Raises:
            FloatingPointError: If the loss or gradient of the window is not finite; the weights are those of the last step.
            ValueError: If no micro-batch of the window had a label token.
        """
        trainer = self._module.trainer
        size, step, scaled = trainer.accumulate_grad_batches, trainer.global_step, self._scaler is not None
        return self.steps.before_optimizer_step(accumulate=size, step=step, scaled=scaled)

    def on_validation_start(self) -> None:
        """Go to the average of an optimizer that averages weights, also in the middle of a window."""
        self.steps.go_to_average()

    def on_train_end(self) -> None:
        """Combine the last statistics of all processes, so that records cover the whole run."""
        if self.geometry is not None:
            self.geometry.reduce()

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the next step depends on, and take the frozen backbone out; a collective."""
        self.steps.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits this model, and only then restore the adapter and the geometry.

        Raises:
            ValueError: If the checkpoint has no entry of ours, or another format version, backbone or adapter.
        """
        self.steps.load(checkpoint)
        self._loaded = True

    def _expect_no_backbone(self, module: nn.Module, incompatible: Any) -> None:
        expect_no_backbone(module, incompatible, self.steps.saved_names)

    def _require_connected(self, optimizers: list[Optimizer]) -> None:
        if optimizers != [self.steps.optimizer]:
            raise RuntimeError(
                f"{type(self._module).__name__}.configure_optimizers: expected the one optimizer that the hooks' connect() was "
                f"given, got {[type(optimizer).__name__ for optimizer in optimizers]}. Return hooks.connect(optimizer)."
            )
