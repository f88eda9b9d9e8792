"""Measures how rank space hangs together with a layer's input and output: E[a xᵀ] `[r, d_in]` and E[s·δ gᵀ] `[d_out, r]`.

They are of the size of the adapter's gradients, and all that its exact penalty needs besides Σ_a and Σ_g, see
`functional.exposure`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grit_lightning import functional as F
from grit_lightning.distributed.collectives import sum_over_processes
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.geometry.sites import LoraSite


class CrossMoments:
    """Sums a xᵀ and s·δ gᵀ of every real token between `start` and `stop`, for every layer of a geometry.

    Args:
        geometry: Whose layers they are.
    """

    def __init__(self, geometry: RankSpaceGeometry) -> None:
        """Register the hooks on `lora_A` and `lora_B`."""
        self._geometry = geometry
        self._sites: Sequence[LoraSite] = [site for group in geometry.groups for site in group.sites]
        self._mask: Tensor | None = None
        self._scale: Tensor | float = 1.0
        self._sums: list[Tensor] = []
        self._tokens = torch.zeros(())
        self._handles = [
            handle
            for index, site in enumerate(self._sites)
            for handle in (
                site.down.register_forward_hook(partial(self._on_down, 2 * index)),
                site.up.register_forward_hook(partial(self._on_up, 2 * index + 1)),
            )
        ]

    def start(self, token_mask: Tensor, gradient_scale: Tensor | float) -> None:
        """Forget what was before, and begin to listen; arguments as for `RankSpaceGeometry.start_micro_batch`."""
        factors = [factor for site in self._sites for factor in (site.down.weight, site.up.weight)]
        dtypes = [torch.promote_types(factor.dtype, torch.float32) for factor in factors]
        self._sums = [torch.zeros_like(factor, dtype=dtype) for factor, dtype in zip(factors, dtypes, strict=True)]
        self._mask, self._scale = token_mask.bool(), gradient_scale
        self._tokens = self._mask.sum().to(self._sums[0].dtype)

    def stop(self) -> None:
        """Stop listening."""
        self._mask = None

    def detach(self) -> None:
        """Remove every hook from the model."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def add_penalty(self, mu: float) -> None:
        """Add the gradient of μ · ½ Σ tr(Σ_g Σ_a) to `.grad` of all trained factors, the same on all processes; a collective.

        Layers whose sums are not finite are left out. The sums are used up.

        Args:
            mu: μ ≥ 0.
        """
        sums = self._sums
        sum_over_processes([*sums, self._tokens])
        covariances = [
            pair
            for group in self._geometry.groups
            for pair in zip(group.a_cov.split(1), group.g_cov.split(1), strict=True)
        ]
        for index, (site, (a_cov, g_cov)) in enumerate(zip(self._sites, covariances, strict=True)):
            inputs, outputs = (
                sums[place].unsqueeze(0) / self._tokens.clamp(min=1) for place in (2 * index, 2 * index + 1)
            )
            gradients = F.exposure_gradients(a_cov, g_cov, inputs, outputs, mu)
            finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
            for factor, gradient in zip((site.down.weight, site.up.weight), gradients, strict=True):
                if factor.grad is not None:
                    factor.grad += torch.where(finite, gradient[0], 0.0).to(factor.grad.dtype)
        self._sums = []

    @torch.no_grad()
    def _on_down(self, place: int, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._mask is not None:
            self._add(place, self._rows(output, place), self._rows(args[0], place))

    def _on_up(self, place: int, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._mask is not None and output.requires_grad:
            output.register_hook(partial(self._on_gradient, place))

    @torch.no_grad()
    def _on_gradient(self, place: int, gradient: Tensor) -> None:
        rows = self._rows(gradient, place) * self._scale
        self._add(place, rows, rows @ self._sites[place // 2].up.weight.to(rows.dtype))

    def _rows(self, values: Tensor, place: int) -> Tensor:
        """Real tokens' rows `[T, d]`; those of padding are zero."""
        assert self._mask is not None
        mask = self._mask.reshape(-1, 1)
        return values.reshape(mask.shape[0], -1).to(self._sums[place].dtype).masked_fill(~mask, 0.0)

    def _add(self, place: int, left: Tensor, right: Tensor) -> None:
        self._sums[place] += left.mT @ right
