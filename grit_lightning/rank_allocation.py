"""AdaLoRA's own choice of ranks (arXiv 2303.10512), which PEFT leaves to the training loop to call."""

from __future__ import annotations

from typing import Any

from peft import AdaLoraModel, PeftModel

from grit_lightning.errors import InvalidValueError


class RankAllocation:
    """Has PEFT's allocator look at the gradients of every optimizer step, and keeps what it depends on for checkpoints.

    Args:
        model: AdaLoRA's model.
    """

    def __init__(self, model: AdaLoraModel) -> None:
        """Begin before the first step."""
        self._model = model
        self._config = model.peft_config[model.trainable_adapter_name]
        self.steps = 0

    @classmethod
    def of(cls, model: PeftModel) -> RankAllocation | None:
        """Return the allocation of an adapter that has one; None for all others.

        Raises:
            ValueError: If the adapter's way of choosing parameters while it trains is not supported.
        """
        tuner = model.base_model
        if isinstance(tuner, AdaLoraModel):
            return cls(tuner)
        if getattr(model.active_peft_config, "use_asa", False):
            raise InvalidValueError(
                "adapter.use_asa: expected false, as AdaMSS would freeze parameters while training, which no checkpoint could "
                "hold, got true. Set it to false, or use peft.AdaLoraConfig."
            )
        return None

    def require_steps(self, steps: int | None) -> None:
        """Check that the run is long enough for the ranks to reach their targets.

        Args:
            steps: Optimizer steps of the run; None if that is not known.

        Raises:
            ValueError: If it is not.
        """
        if steps is not None and self._config.total_step > steps:
            raise InvalidValueError(
                f"adapter.total_step: expected at most the {steps} optimizer steps of this run, by whose end the ranks have to "
                f"reach target_r, got {self._config.total_step}. Set it to {steps}, or train longer."
            )

    def after_step(self, *_: object) -> None:
        """Let the allocator choose: after the step of an optimizer, while its gradients are still there."""
        self.steps += 1
        self._model.update_and_allocate(self.steps)

    def state_dict(self) -> dict[str, Any]:
        """Return steps, ranks and averaged importances."""
        allocator = self._model.rankallocator
        return {
            "steps": self.steps,
            "rank_pattern": self._config.rank_pattern,
            "importance": {name: value.cpu() for name, value in allocator.exp_avg_ipt.items()},
            "uncertainty": {name: value.cpu() for name, value in allocator.exp_avg_unc.items()},
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: If there is none.
        """
        if state is None:
            raise InvalidValueError(
                "Checkpoint: expected the state of AdaLoRA's allocator, got none, as in checkpoints of versions that never "
                "called it. Train anew."
            )
        self.steps, self._config.rank_pattern = state["steps"], state["rank_pattern"]
        allocator, parameters = self._model.rankallocator, dict(self._model.model.named_parameters())
        for name in state["importance"]:
            device = parameters[name].device
            allocator.exp_avg_ipt[name] = state["importance"][name].to(device)
            allocator.exp_avg_unc[name] = state["uncertainty"][name].to(device)
            allocator.ipt[name] = allocator.exp_avg_ipt[
                name
            ]  # written before it is read; PEFT looks whether it is there
