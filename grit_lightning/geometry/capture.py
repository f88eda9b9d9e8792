"""Sees the rank-space activation a and its gradient g of every layer, with one tensor hook on `lora_A`'s output.

Nothing of the layer's input or output gradient is stored or recomputed: a `[.., r]` is kept alive by autograd anyway,
and g = s·Bᵀδ `[.., r]` arrives at the hook for free.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grit_lightning import functional as F
from grit_lightning.errors import InvalidValueError
from grit_lightning.geometry.rank_group import RankGroup
from grit_lightning.geometry.stopwatch import Stopwatch


class RankSpaceCapture:
    """Adds a aᵀ and g gᵀ of every backward pass while it listens to the micro-batch sums of the rank groups.

    A forward pass at any other time, or without gradients (evaluation, the first pass of re-entrant activation
    checkpointing), leaves no trace. A recomputed forward pass registers a hook that never fires, so that checkpointing
    counts once; a module that runs twice counts both of its uses.
    """

    def __init__(self, groups: Iterable[RankGroup], stopwatch: Stopwatch) -> None:
        """Register one forward hook on the `lora_A` module of every layer."""
        self._stopwatch = stopwatch
        self._token_mask: Tensor | None = None
        self._gradient_scale: Tensor | float = 1.0
        self._loss_scale: Tensor | float | None = None
        self._measures = False
        self._handles = [
            site.down.register_forward_hook(partial(self._on_forward, group, index))
            for group in groups
            for index, site in enumerate(group.sites)
        ]

    def start(
        self, token_mask: Tensor, gradient_scale: Tensor | float, *, measures: bool, loss_scale: Tensor | float | None
    ) -> None:
        """Begin to listen.

        Args:
            token_mask: `[B, T]` bool, True where a token is real.
            gradient_scale: Factor that turns the gradients autograd will deliver into gradients of the sum of token
                losses.
            measures: Whether this micro-batch adds to the statistics.
            loss_scale: Factor in front of the mean loss (AMP scale / accumulation steps) if regularisers are on, which
                then add their gradient; None otherwise.
        """
        self._token_mask, self._gradient_scale = token_mask, gradient_scale
        self._measures, self._loss_scale = measures, loss_scale

    def stop(self) -> None:
        """Stop listening."""
        self._token_mask = None

    @property
    def token_mask(self) -> Tensor | None:
        """Mask of the micro-batch that is measured, None where none is."""
        return self._token_mask if self._measures else None

    def detach(self) -> None:
        """Remove every hook from the model."""
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph break; the hook runs eagerly
    def _on_forward(self, group: RankGroup, index: int, module: nn.Module, args: Any, output: Tensor) -> None:
        mask = self._token_mask
        if mask is None or not output.requires_grad:
            return
        if output.shape[:-1].numel() != mask.numel():
            raise InvalidValueError(
                f"Layer '{group.sites[index].name}': expected the {mask.numel()} positions of the batch's attention_mask, got "
                f"{output.shape[:-1].numel()}. Layers that see only some tokens (routed experts) have no known padding: leave "
                "them out of `adapter.target_modules`, or set `geometry: null`."
            )
        activation, mask, scale = output.detach(), mask.reshape(output.shape[:-1]), self._gradient_scale
        if self._measures:
            output.register_hook(lambda gradient: self._on_gradient(group, index, activation, gradient, mask, scale))
        if self._loss_scale is not None and group.derived.penalty is not None:
            form, factor = group.derived.penalty[index], self._loss_scale / mask.sum()
            output.register_hook(
                lambda gradient: gradient + _penalty_gradient(activation, form, mask, factor, gradient)
            )

    @torch.no_grad()
    def _on_gradient(
        self, group: RankGroup, index: int, activation: Tensor, gradient: Tensor, mask: Tensor, scale: Tensor | float
    ) -> None:
        with self._stopwatch("capture"):
            group.statistics.micro.a[index] += F.masked_gram(activation, mask)
            group.statistics.micro.g[index] += F.masked_gram(gradient.float() * scale, mask)
            group.calls[index] += 1


@torch.no_grad()
def _penalty_gradient(activation: Tensor, form: Tensor, mask: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    """Gradient of (factor) · ½ Σ aᵀQa over real tokens, at every activation: it joins the loss's own on the way to A."""
    rows = activation.float().masked_fill(~mask.unsqueeze(-1), 0.0)
    return (rows @ form * factor).to(like.dtype)
