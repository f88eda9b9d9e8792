"""What the statistics do to gradients: damped inverses refreshed now and then, applied at every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grit_lightning import functional as F
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.rank_group import RankGroup


class Preconditioner:
    """Derives inverses, eigenbases and penalty forms from the covariances of a group, and applies the inverses.

    Args:
        config: Settings of the geometry.
    """

    def __init__(self, config: GeometryConfig) -> None:
        """Remember the settings; all state is the group's."""
        self._config = config

    def refresh(self, group: RankGroup, step: int, *, with_bases: bool) -> None:
        """Invert the damped factors, one batched Cholesky each, over the coordinates below the effective rank.

        Args:
            group: Layers to refresh.
            step: Optimizer steps so far.
            with_bases: Compute eigenbases too.
        """
        kept = group.kept
        block = kept.unsqueeze(-1) & kept.unsqueeze(-2)
        device = torch.device("cpu") if self._config.kfac_inversion_device == "cpu" else group.device
        inverses, bases = [], []
        for cov in (group.a_cov, group.g_cov):
            cov = cov.masked_fill(~block, 0.0).to(device)
            if with_bases:
                bases.append(F.eigenbasis(cov)[1].to(group.device))
            result = F.damped_inverse(cov, self._damping(group, cov, step))
            climbed = (result.attempts - 1).clamp(min=0).masked_fill(result.failed & (cov == 0).flatten(1).all(-1), 0)
            group.escalations += climbed.to(group.device)
            inverses.append(result.inverse.to(group.device))
        group.a_inverse, group.g_inverse = inverses
        group.ready = group.tokens >= self._config.kfac_min_samples
        group.any_ready = bool(group.ready.any())  # the one host sync, so that steps need none
        if self._config.regularised:
            group.penalty = self._penalty_form(group, step)
        if with_bases:
            identity = torch.eye(group.r, device=group.device)
            group.a_basis, group.g_basis = (torch.where(group.ready.view(-1, 1, 1), u, identity) for u in bases)
            group.basis_version += 1

    def apply(self, group: RankGroup, step: int, wanted: bool) -> None:
        """Precondition the gradients of a group in place, if wanted, and keep dropped directions still.

        Args:
            group: Layers whose factors have gradients.
            step: Number of the optimizer step under way, from 1.
            wanted: False leaves gradients raw, but for the dropped directions.
        """
        active = wanted and step > self._config.ng_warmup_steps and group.any_ready
        group.natural = active
        reduced = bool((group.ranks < group.r).any())
        if not active and not reduced:
            return
        swapped = self._config.pairing == F.Pairing.SWAPPED.value
        left, right = (group.a_inverse, group.g_inverse) if swapped else (group.g_inverse, group.a_inverse)
        kept = group.kept.float()

        def transform(side: str) -> Callable[[Tensor, Tensor], Tensor]:
            def update(raw: Tensor, layers: Tensor) -> Tensor:
                result = raw.float()
                if reduced and side == "b":
                    group.observe_gradients(result, layers, self._config.decay)
                if active:
                    result = self._preconditioned(group, result, layers, side, left if side == "a" else right)
                shape = (-1, group.r, 1) if side == "a" else (-1, 1, group.r)
                return result * kept[layers].view(shape) if reduced else result

            return update

        for side in ("a", "b"):
            group.apply(side, lambda factor: factor.grad, transform(side))

    def _preconditioned(self, group: RankGroup, raw: Tensor, layers: Tensor, side: str, inverse: Tensor) -> Tensor:
        """Precondition stacked gradients, graft, and fall back to the raw gradient where the result is not finite."""
        apply = F.precondition_a if side == "a" else F.precondition_b
        new = apply(raw, inverse[layers])
        if self._config.grafting:
            new = F.graft(new, raw)
        if self._config.trust_clip is not None:
            new = F.trust_clip(new, raw, self._config.trust_clip)
        new, fell_back = F.finite_or_raw(new, raw)
        group.fallbacks.index_add_(0, layers, fell_back.long())
        return torch.where(group.ready[layers].view(-1, 1, 1), new, raw)

    def _damping(self, group: RankGroup, cov: Tensor, step: int) -> Tensor:
        """λ `[L]` of one factor, by the configured mode."""
        noise = group.quantization_noise if self._config.damping_mode == "quantization_aware" else None
        return F.damping_levels(
            cov,
            self._config.kfac_damping,
            self._config.damping_mode,
            tokens=(group.tokens / max(step, 1)).to(cov.device),
            reference_tokens=self._config.damping_reference_tokens,
            noise=None if noise is None else noise.to(cov.device),
        )

    def _penalty_form(self, group: RankGroup, step: int) -> Tensor:
        """Q `[L, r, r]` of the regularisers at the weights of this step, for the layers with enough samples."""
        warmup = self._config.penalty_warmup_steps
        ramp = 1.0 if warmup == 0 else min(1.0, step / warmup)
        _, vectors = F.eigenbasis(group.a_cov)
        gram = torch.stack(
            [site.scaling**2 * site.up.weight.float().mT @ site.up.weight.float() for site in group.sites]
        )
        form = F.curvature_form(group.g_cov, ramp * self._config.curvature_penalty)
        form = form + F.reprojection_form(
            F.projector(vectors, group.kept.sum(-1)), gram, ramp * self._config.reprojection_penalty
        )
        return form * group.ready.view(-1, 1, 1)
