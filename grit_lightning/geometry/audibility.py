"""Which adapted layers can be heard: found out before training, by one forward and backward pass over a few tokens.

Statistics come from the output a of a layer's `lora_A` and from the gradient that arrives there, one row a token of the batch.
A layer is silent if it never runs, runs outside of `lora_A`, takes no part in the loss, or sees only some of the tokens, whose
padding is then unknown (routed experts).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from grit_lightning.backbones.inputs import context_length
from grit_lightning.errors import InvalidValueError
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.geometry.sites import LoraSite

PROBE_TOKENS = 16
"""Enough that a routed expert does not see all of them, and that no cost shows."""


def probe_token_ids(model: nn.Module, device: torch.device) -> Tensor:
    """Return `[1, T]` different token ids out of the lower half, where no model keeps its image tokens; T ≤ PROBE_TOKENS.

    Args:
        model: With a configuration of transformers.
        device: Where the ids are wanted.
    """
    config: Any = model.config
    vocabulary: int = config.get_text_config().vocab_size
    tokens = min(PROBE_TOKENS, context_length(model) or PROBE_TOKENS)
    return (torch.arange(tokens, device=device) * max(vocabulary // (2 * tokens), 1) % vocabulary).unsqueeze(0)


def silent_layers(
    model: nn.Module, sites: Iterable[LoraSite], loss: Callable[[], Tensor], tokens: int
) -> dict[str, str]:
    """Run `loss` and its backward pass once, and return the names of the silent layers with what is wrong with each.

    It leaves nothing behind: no gradient of a parameter is computed, and the random numbers, the buffers and the training mode
    of the model are put back.

    Args:
        model: Has the layers.
        sites: The layers in question.
        loss: Runs the model over a batch and returns its loss.
        tokens: Tokens of that batch.
    """
    sites, outputs = list(sites), defaultdict(list)

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[name].append(output)

    with _untouched(model), torch.enable_grad(), ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(_hook(site.down, partial(keep, site.name)))
        value = loss()
        hooks.close()  # activation checkpointing runs layers once more in the backward pass
        heard = _with_gradient(value, [output for found in outputs.values() for output in found])
    found = {site.name: _fault(outputs[site.name], heard, tokens) for site in sites}
    return {name: fault for name, fault in found.items() if fault}


def settle_layers(geometry: RankSpaceGeometry, model: nn.Module, loss: Callable[[], Tensor], tokens: int) -> None:
    """Leave silent layers out of a geometry before it takes statistics, or refuse them, as `GeometryConfig.silent_layers` says.

    Args:
        geometry: The geometry.
        model: As for `silent_layers`, like the two that follow.
        loss: Runs the model over a batch and returns its loss.
        tokens: Tokens of that batch.

    Raises:
        ValueError: If they are refused, or no layer would be left.
    """
    silent = silent_layers(model, (site for group in geometry.groups for site in group.sites), loss, tokens)
    if not silent:
        return
    shown = "; ".join(f"{name} {fault}" for name, fault in list(silent.items())[:8])
    shown += f"; and {len(silent) - 8} more" if len(silent) > 8 else ""
    some_are_heard = len(silent) < len(geometry.layers)
    if geometry.config.silent_layers == "leave_out" and some_are_heard:
        rank_zero_warn(
            f"model.geometry.silent_layers: left {len(silent)} of {len(geometry.layers)} adapted layers out of the geometry, "
            f"which are trained as a plain adapter: {shown}."
        )
        geometry.leave_out(silent)
        return
    way_out = "set model.geometry.silent_layers to leave_out, or " if some_are_heard else ""
    raise InvalidValueError(
        f"adapter.target_modules: expected layers that the geometry can take statistics of, got {len(silent)} of "
        f"{len(geometry.layers)} that it cannot: {shown}. Take these out of adapter.target_modules, {way_out}set "
        "model.geometry to null."
    )


def _with_gradient(loss: Tensor, outputs: list[Tensor]) -> set[int]:
    """Return the ids of the outputs that the loss has a gradient for."""
    outputs = [output for output in outputs if output.requires_grad]
    if not loss.requires_grad or not outputs:
        return set()
    gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
    return {id(output) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None}


def _fault(outputs: list[Tensor], heard: set[int], tokens: int) -> str | None:
    if not outputs:
        return "never runs its lora_A"
    if any(output.shape[:-1].numel() != tokens for output in outputs):
        return "sees only some of the tokens"
    return None if any(id(output) in heard for output in outputs) else "takes no part in the loss"


@contextmanager
def _hook(module: nn.Module, hook: Callable[[nn.Module, Any, Tensor], None]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Give evaluation mode without dropout, and afterwards modes, buffers and random numbers as they were."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modes
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer.copy_(value)
