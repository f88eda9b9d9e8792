"""What the statistics do to gradients: damped inverses refreshed now and then, applied at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from grit_lightning import functional as F
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.derived import Derived
from grit_lightning.geometry.rank_group import RankGroup


class Preconditioner:
    """Derives inverses, eigenbases and penalty forms from the covariances of a group, and applies the inverses.

    Args:
        config: Settings of the geometry.
    """

    def __init__(self, config: GeometryConfig) -> None:
        """Remember the settings; all state is the group's."""
        self._config = config

    # Refreshing.

    def refresh(self, group: RankGroup, tokens_per_step: Tensor, *, with_bases: bool) -> None:
        """Derive everything anew: one batched Cholesky a factor, over the coordinates below the effective rank.

        Args:
            group: Layers to refresh.
            tokens_per_step: `[L]`, mean over the optimizer steps so far.
            with_bases: Compute eigenbases too.
        """
        kept = group.kept
        block = kept.unsqueeze(-1) & kept.unsqueeze(-2)
        device = torch.device("cpu") if self._config.kfac_inversion_device == "cpu" else group.device
        inverses, bases = [], [group.derived.a_basis, group.derived.g_basis]
        ready = group.counts.tokens >= self._config.kfac_min_samples
        for side, cov in enumerate((group.a_cov, group.g_cov)):
            cov = cov.masked_fill(~block, 0.0).to(device)
            if with_bases:
                identity = torch.eye(group.r, dtype=torch.float32, device=group.device)
                vectors = F.eigenbasis(cov)[1].to(group.device)
                bases[side] = torch.where(ready.view(-1, 1, 1), vectors, identity)
            result = F.damped_inverse(cov, self._damping(group, cov, tokens_per_step))
            climbed = (result.attempts - 1).clamp(min=0).masked_fill(result.failed & (cov == 0).flatten(1).all(-1), 0)
            group.counts.escalations += climbed.to(group.device)
            inverses.append(result.inverse.to(group.device))
        group.derived = Derived(
            a_inverse=inverses[0],
            g_inverse=inverses[1],
            a_basis=bases[0],
            g_basis=bases[1],
            ready=ready,
            any_ready=bool(ready.any()),  # the one host sync, so that steps need none
            penalty=self._penalty_form(group, ready) if self._config.regularised else None,
            version=group.derived.version + 1,
        )

    def _damping(self, group: RankGroup, cov: Tensor, tokens_per_step: Tensor) -> Tensor:
        """λ `[L]` of one factor, by the configured mode."""
        noise = group.quantization_noise
        return F.damping_levels(
            cov,
            self._config.kfac_damping,
            self._config.damping_mode,
            tokens=tokens_per_step.to(cov.device),
            reference_tokens=self._config.damping_reference_tokens,
            noise=None if noise is None else noise.to(cov.device),
        )

    def _penalty_form(self, group: RankGroup, ready: Tensor) -> Tensor:
        """Q `[L, r, r]` of the regularisers at full weight, for the layers with enough samples."""
        _, vectors = F.eigenbasis(group.a_cov)
        gram = torch.stack(
            [site.scaling**2 * site.up.weight.float().mT @ site.up.weight.float() for site in group.sites]
        )
        form = F.curvature_form(group.g_cov, self._config.curvature_penalty)
        form = form + F.reprojection_form(
            F.projector(vectors, group.kept.sum(-1)), gram, self._config.reprojection_penalty
        )
        return form * ready.view(-1, 1, 1)

    # Applying.

    def warming_up(self, step: int) -> bool:
        """Say whether optimizer step `step` (from 1) leaves gradients as they are."""
        warmup = self._config.ng_warmup_steps
        return warmup is None or 0 < step <= warmup

    def apply(self, group: RankGroup, step: int, wanted: bool) -> None:
        """Precondition the gradients of a group in place, if wanted, and keep dropped directions still.

        Args:
            group: Layers whose factors have gradients.
            step: Number of the optimizer step under way, from 1.
            wanted: False leaves gradients raw, but for the dropped directions.
        """
        preconditions = wanted and not self.warming_up(step) and group.derived.any_ready
        group.last_step_preconditioned = preconditions
        reduced = bool((group.ranks < group.r).any())
        if not preconditions and not reduced:
            return
        kept = group.kept.float()

        def update(of_a: Tensor | None, of_b: Tensor | None, layers: Tensor) -> tuple[Tensor | None, Tensor | None]:
            raw_a, raw_b = (None if raw is None else raw.float() for raw in (of_a, of_b))
            if reduced and raw_b is not None:
                group.statistics.add_gradients(raw_b, layers, self._config.decay)
            new_a, new_b = self._preconditioned(group, raw_a, raw_b, layers) if preconditions else (raw_a, raw_b)
            if reduced:
                new_a = None if new_a is None else new_a * kept[layers].unsqueeze(-1)
                new_b = None if new_b is None else new_b * kept[layers].unsqueeze(-2)
            return new_a, new_b

        group.update_pairs(lambda factor: factor.grad, update)

    def _preconditioned(
        self, group: RankGroup, raw_a: Tensor | None, raw_b: Tensor | None, layers: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Precondition stacked gradients of the layers `[n]`."""
        inverses = group.derived.a_inverse[layers], group.derived.g_inverse[layers]
        new_a, new_b = F.precondition(raw_a, raw_b, *inverses, self._config.pairing)
        return self._safeguarded(group, new_a, raw_a, layers), self._safeguarded(group, new_b, raw_b, layers)

    def _safeguarded(self, group: RankGroup, new: Tensor | None, raw: Tensor | None, layers: Tensor) -> Tensor | None:
        """Graft, clip, and fall back to the raw gradient where the result is not finite or the layer is not ready."""
        if new is None or raw is None:
            return None
        if self._config.grafting:
            new = F.graft(new, raw)
        if self._config.trust_clip is not None:
            new = F.trust_clip(new, raw, self._config.trust_clip)
        new, fell_back = F.finite_or_raw(new, raw)
        group.counts.fallbacks.index_add_(0, layers, fell_back.long())
        return torch.where(group.derived.ready[layers].view(-1, 1, 1), new, raw)
