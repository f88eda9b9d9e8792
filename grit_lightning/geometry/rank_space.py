"""The rank-space geometry of a LoRA model: its curvature statistics, and what they do to gradients and factors.

Per adapted layer, with a = A x and g = ∂L/∂a of the sum of token losses over N real tokens,

    Σ_a = E[a aᵀ],  Σ_g = E[g gᵀ]          both [r, r], float32
    ∇A ← (Σ_g + λI)⁻¹ ∇A,  ∇B ← ∇B (Σ_a + λI)⁻¹

The object owns state only. The maths is in `functional`; when things happen is decided by the module (every optimizer
step) and by callbacks (reprojection, rank).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grit_lightning import functional as F
from grit_lightning.distributed.collectives import is_first_process, process_count, sum_over_processes
from grit_lightning.errors import InvalidValueError
from grit_lightning.geometry.capture import RankSpaceCapture
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.coordinates import CoordinateChange
from grit_lightning.geometry.derived import Derived
from grit_lightning.geometry.optimizer_state import require_followable
from grit_lightning.geometry.preconditioner import Preconditioner
from grit_lightning.geometry.rank_group import RankGroup, group_by_rank
from grit_lightning.geometry.sites import LoraSite, count_trainable, find_lora_sites, used_ranks
from grit_lightning.geometry.statistics import LayerCounts, Statistics
from grit_lightning.geometry.stopwatch import Stopwatch


@dataclass(frozen=True)
class LayerView:
    """What the geometry knows of one adapted layer, always current."""

    name: str
    group: RankGroup
    index: int

    @property
    def a_cov(self) -> Tensor:
        """Σ_a, float32 `[r, r]`."""
        here = slice(self.index, self.index + 1)
        return F.covariance(self._total.a[here], self._total.weight[here])[0]

    @property
    def g_cov(self) -> Tensor:
        """Σ_g, float32 `[r, r]`, of gradients of the sum of token losses."""
        here = slice(self.index, self.index + 1)
        return F.covariance(self._total.g[here], self._total.weight[here])[0]

    @property
    def n_samples(self) -> int:
        """Tokens of all processes that have contributed since the start, as of the last `reduce`; own ones since then too."""
        return int(self.group.counts.tokens[self.index])

    @property
    def rank(self) -> int:
        """Effective rank k ≤ r."""
        return int(self.group.ranks[self.index])

    @property
    def counters(self) -> dict[str, int]:
        """Events of this layer: `rejected` micro-batches, `fallbacks` to the raw gradient, damping `escalations`."""
        return {name: counts[self.index] for name, counts in self.group.counts.events().items()}

    @property
    def _total(self) -> Statistics:
        return self.group.statistics.total


class RankSpaceGeometry:
    """Curvature state of every LoRA layer of a model, and the operations that use it.

    One training step, in the module's words:

        geometry.start_micro_batch(mask, scale)   before forward
        geometry.finish_micro_batch()             after backward, once per micro-batch
        geometry.step()                           once per optimizer step: statistics, refresh, preconditioned gradients

    Args:
        model: PEFT model with one active LoRA adapter.
        config: Settings.
        sites: The layers to follow, if they are known; None finds them.

    Attributes:
        groups: The layers that it follows, by rank.
        left_out: Adapted layers that it does not follow, because no statistics can come from them.

    Raises:
        ValueError: If the model has no plain linear LoRA layer.
    """

    def __init__(self, model: nn.Module, config: GeometryConfig, sites: Iterable[LoraSite] | None = None) -> None:
        """Find the layers and register the hooks."""
        self.config = config
        self.stopwatch = Stopwatch()
        self.left_out: list[LoraSite] = []
        self._companions: list[RankSpaceGeometry] = []
        self._listen_to(find_lora_sites(model) if sites is None else sites)
        self.reprojection_count = 0
        self.compute_bases = False  # set by optimizers that need eigenbases
        self.trainable_parameters = count_trainable(model)
        self._preconditioner = Preconditioner(config)
        self._micro_batches = 0
        self._window_micro_batches = 0
        self._steps = 0
        self._windows_since_reduce = 0

    def _listen_to(self, sites: Iterable[LoraSite]) -> None:
        """Begin with these layers, without any statistics of them."""
        self.groups = group_by_rank(sites)
        self.layers: Mapping[str, LayerView] = {
            site.name: LayerView(site.name, group, index)
            for group in self.groups
            for index, site in enumerate(group.sites)
        }
        if self.config.damping_mode == "quantization_aware":
            for group in self.groups:
                group.measure_quantization_noise()  # now: a sharded layer has no weights to look at
        self._capture = RankSpaceCapture(self.groups, self.stopwatch)

    def leave_out(self, names: Container[str]) -> None:
        """Stop following these layers, and begin anew with the others; before any statistics are taken."""
        sites = [site for group in self.groups for site in group.sites]
        self._capture.detach()
        self.left_out += [site for site in sites if site.name in names]
        self._listen_to(site for site in sites if site.name not in names)

    def beside(self, model: nn.Module, config: GeometryConfig) -> RankSpaceGeometry:
        """Return a second estimate of the same layers, for other data: its statistics follow every change of coordinates here.

        Feed it with `start_micro_batch`, `finish_micro_batch` and `finish_window`; it never touches a gradient or a weight.

        Args:
            model: As above.
            config: Settings of the second estimate.
        """
        other = RankSpaceGeometry(model, config, [site for group in self.groups for site in group.sites])
        other.to(self.groups[0].device)
        self._companions.append(other)
        return other

    def release(self, other: RankSpaceGeometry) -> None:
        """Forget an estimate that `beside` returned, if it is not forgotten yet, and remove its hooks."""
        self._companions = [companion for companion in self._companions if companion is not other]
        other.detach()

    # Reading.

    @property
    def ranks(self) -> dict[str, int]:
        """Effective rank of every layer by name."""
        return {
            site.name: rank
            for group in self.groups
            for site, rank in zip(group.sites, group.ranks.tolist(), strict=True)
        }

    @property
    def mean_rank(self) -> float:
        """Mean effective rank over layers."""
        return sum(int(group.ranks.sum()) for group in self.groups) / len(self.layers)

    @property
    def effective_parameters(self) -> int:
        """Σ k·(d_in + d_out) over layers: what a compacted adapter holds (paper, '# Params Trained').

        k is the last column of B that is not zero: one that a risen rank allows counts as soon as it has grown.
        """
        sites = [*(site for group in self.groups for site in group.sites), *self.left_out]
        return sum(rank * site.parameters_per_rank for site, rank in zip(sites, used_ranks(sites), strict=True))

    @property
    def counters(self) -> dict[str, int]:
        """Events over all layers: rejected micro-batches, gradient fallbacks, damping escalations."""
        totals: Counter[str] = Counter()
        for group in self.groups:
            totals.update({name: sum(counts) for name, counts in group.counts.events().items()})
        return dict(totals)

    # Statistics.

    def to(self, device: torch.device) -> None:
        """Move the statistics to the device of the adapter."""
        for group in self.groups:
            group.to(device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a count that changes would be compiled anew at every step
    def start_micro_batch(
        self, token_mask: Tensor, gradient_scale: Tensor | float, loss_scale: Tensor | float | None = None
    ) -> None:
        """Begin to listen: call before the forward pass whose backward pass is to be counted.

        Args:
            token_mask: `[B, T]`, non-zero where a token is real.
            gradient_scale: Factor that turns the gradients autograd will deliver into those of the sum of token losses:
                (label tokens the loss was averaged over) · (accumulation steps) / (AMP loss scale).
            loss_scale: (AMP loss scale) / (accumulation steps) if regularisers are on: their gradients are added to the
                backward pass, after the statistics have seen the loss's own. None adds nothing.
        """
        for group in self.groups:
            group.start_micro_batch()
        measures = self._micro_batches % self.config.cov_update_freq == 0
        if loss_scale is not None:
            loss_scale = loss_scale * self._penalty_weight
        if measures or loss_scale is not None:
            self._capture.start(token_mask.bool(), gradient_scale, measures=measures, loss_scale=loss_scale)

    @torch.no_grad()
    def finish_micro_batch(self) -> None:
        """Take a finished backward pass into the window; a layer whose sums are not finite is left out and counted."""
        mask = self._capture.token_mask
        self._capture.stop()
        self._micro_batches += 1
        if mask is None:
            return
        with self.stopwatch("capture"):
            tokens = mask.sum()
            for group in self.groups:
                group.finish_micro_batch(tokens)
            self._window_micro_batches += 1

    def discard_window(self) -> None:
        """Forget the accumulation window under way, for a step that the optimizer will skip."""
        for group in self.groups:
            group.statistics.window.clear()
        self._window_micro_batches = 0

    @torch.no_grad()
    def finish_window(self) -> None:
        """Take the accumulation window into this process's own sums, as the statistics of one optimizer step."""
        for group in self.groups:
            group.finish_window(self.config.decay)
        self._window_micro_batches = 0
        self._windows_since_reduce += 1
        self._steps += 1

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum what this process has gathered over all processes into the running estimate.

        That takes one all-reduce of sums and one of counts. Every process must call it at the same step. Without a process
        group it only merges; when no window has ended since the last call, it does nothing.
        """
        if self._windows_since_reduce == 0:
            return
        counts = [group.counts.unreduced_counts() for group in self.groups]
        sums = [tensor for group in self.groups for tensor in group.statistics.local.tensors()]
        sum_over_processes([*sums, *counts])
        for group, of_all in zip(self.groups, counts, strict=True):
            group.counts.set_reduced_counts(of_all)
            group.statistics.total.accumulate(group.statistics.local, self.config.decay**self._windows_since_reduce)
        self._windows_since_reduce = 0

    # Preconditioning.

    @property
    def warming_up(self) -> bool:
        """Whether gradients pass unchanged in the optimizer step under way, whatever the update rule (`ng_warmup_steps`)."""
        return self._preconditioner.warming_up(self._steps)

    def in_force(self, group: RankGroup) -> Derived:
        """Return what update rules may use of a group in the optimizer step under way: identities while warming up."""
        if not self.warming_up:
            return group.derived
        return Derived.before_any_refresh(len(group.sites), group.r).to(group.device)

    @torch.no_grad()
    def step(self, precondition: bool = True) -> None:
        """Close the accumulation window: update statistics, refresh inverses when due, precondition `.grad` in place.

        Args:
            precondition: False leaves gradients raw, for an optimizer that applies the geometry itself.

        Raises:
            RuntimeError: At the first refresh, if a layer has sent no statistics; the message names the layers.
        """
        with self.stopwatch("precondition"):
            self.finish_window()
            if process_count() == 1 or self.refresh_due:
                self.reduce()
            if self.refresh_due:
                self._require_captures()
                self.refresh()
            for group in self.groups:
                self._preconditioner.apply(group, self._steps, precondition)

    @property
    def refresh_due(self) -> bool:
        """Whether the optimizer step under way refreshes the inverses."""
        return self._steps % self.config.kfac_update_freq == 0

    def refresh(self) -> None:
        """Invert the damped factors of every layer, and whatever else is derived from the statistics now and then."""
        micro_batches = max(self._micro_batches, 1)
        measured = math.ceil(micro_batches / self.config.cov_update_freq)  # tokens are counted in these only
        for group in self.groups:
            tokens_per_step = group.counts.tokens.float() * (micro_batches / measured) / max(self._steps, 1)
            self._preconditioner.refresh(group, tokens_per_step, with_bases=self.compute_bases)

    @property
    def penalty(self) -> Tensor:
        """Value of the regularisers summed over layers, in nats per token, at their forms of the last refresh."""
        forms = [(group.derived.penalty, group.a_cov) for group in self.groups if group.derived.penalty is not None]
        values = [F.quadratic_penalty(form, cov).sum() for form, cov in forms]
        return self._penalty_weight * torch.stack(values or [torch.zeros((), dtype=torch.float32)]).sum()

    @property
    def _penalty_weight(self) -> float:
        """Share of the regularisers' weights in force in the optimizer step under way: rises linearly from 0 to 1."""
        warmup = self.config.penalty_warmup_steps
        return 1.0 if warmup == 0 else min(1.0, self._steps / warmup)

    def _require_captures(self) -> None:
        silent = [
            site.name
            for group in self.groups
            for site, count in zip(group.sites, group.counts.capture_counts.tolist(), strict=True)
            if count == 0
        ]
        if silent:
            shown = ", ".join(silent[:8]) + (f" and {len(silent) - 8} more" if len(silent) > 8 else "")
            raise RuntimeError(
                f"Expected curvature statistics of all {len(self.layers)} adapted layers by the first refresh (optimizer step "
                f"{self._steps}), got none of {len(silent)}: {shown}. Either they take no part in the loss, then leave them "
                "out of `adapter.target_modules`; or their forward pass bypasses lora_A's hook, then set `geometry: null`."
            )

    # Reprojection.

    @torch.no_grad()
    def reproject(
        self,
        maps: F.MapsRule,
        ranks: Mapping[str, int] | None = None,
        *,
        blend: float = 1.0,
        optimizer: Optimizer | None = None,
    ) -> None:
        """Change coordinates of every layer with enough samples, and keep the first k of them.

        Weights, covariances and optimizer moments go through the same linear maps; inverses are recomputed.

        Args:
            maps: Given `(a_cov, g_cov, kept, reliable_g)`, stacked over layers, returns the maps of A and B; kept `[L, r]`
                bool marks the coordinates that stay.
            ranks: New effective ranks by layer name; layers not named keep theirs.
            blend: γ in (0, 1]; below 1 the projection is partial and ranks stay as they are.
            optimizer: Its moments of A and B are carried along.

        Raises:
            ValueError: If a rank is not in 1 … r, or the optimizer cannot follow, see `require_followable`.
        """
        self._change_coordinates(repeat(maps), ranks or {}, blend, optimizer)
        self.reprojection_count += 1

    @torch.no_grad()
    def edit(self, maps: Sequence[Tensor], *, optimizer: Optimizer | None = None) -> None:
        """Change the adapter's function: B ← B X for every layer with enough samples.

        Statistics and moments follow as through a reprojection with maps I and X, that is for unchanged output gradients: right
        up to the change of the gradients that the edit itself causes.

        Args:
            maps: X `[L, r, r]` for each of `groups`, in their order; it mixes nothing beyond a reduced rank with what is below.
            optimizer: Its moments of A and B are carried along.

        Raises:
            ValueError: If the optimizer cannot follow, see `require_followable`.
        """
        self._change_coordinates([_rule_of(x) for x in maps], {}, 1.0, optimizer)

    @torch.no_grad()
    def set_ranks(
        self,
        maps: F.MapsRule,
        ranks: Mapping[str, int],
        *,
        masked_coordinate: Mapping[str, int] | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        """Give layers new effective ranks, at once; like `reproject`, but counts as no reprojection.

        Layers whose rank falls go through `maps`. Where it rises, ΔW stays as it is: the dropped directions that B's
        gradient pulls at most come first (`functional.regrowth`), and their columns grow from zero.

        Args:
            maps: As in `reproject`; should leave ΔW as it is but for the directions that are dropped.
            ranks: New effective ranks by layer name.
            masked_coordinate: By layer name, a coordinate that is zeroed in B this once; it may grow back from the next
                step on.
            optimizer: Its moments of A and B are carried along.

        Raises:
            ValueError: If a rank is not in 1 … r, or the optimizer cannot follow, see `require_followable`.
        """
        if masked_coordinate or any(self.layers[name].rank != rank for name, rank in ranks.items()):
            self._change_coordinates(
                repeat(maps), ranks, 1.0, optimizer, masked_coordinate or {}, only_where_needed=True
            )

    @torch.no_grad()
    def hold_ranks(self) -> None:
        """Keep B zero beyond the ranks after a step of an optimizer that moves it without a gradient, as 8-bit ones may."""
        beyond = [
            b[:, rank:]
            for group in self.groups
            for b, rank in zip(group.factors("b"), group.ranks.tolist(), strict=True)
            if rank < group.r
        ]
        if beyond:
            torch._foreach_zero_(beyond)

    def has_enough_samples(self, group: RankGroup) -> Tensor:
        """Layers `[L]` bool of a group with enough samples for decisions (`kfac_min_samples`)."""
        return group.counts.tokens >= max(self.config.kfac_min_samples, 1)

    def _change_coordinates(
        self,
        rules: Iterable[F.MapsRule],
        ranks: Mapping[str, int],
        blend: float,
        optimizer: Optimizer | None,
        masked_coordinate: Mapping[str, int] | None = None,
        *,
        only_where_needed: bool = False,
    ) -> None:
        if optimizer is not None:
            require_followable(optimizer)
        with self.stopwatch("reprojection"):
            for geometry in (self, *self._companions):
                geometry.reduce()
            for index, (group, rule) in enumerate(zip(self.groups, rules, strict=False)):
                change = CoordinateChange(
                    group, ranks, masked_coordinate or {}, self.has_enough_samples(group), only_where_needed
                )
                maps = change.apply(rule, blend, optimizer)
                for other in self._companions:
                    other.groups[index].statistics.change_coordinates(maps)
            if self._steps >= self.config.kfac_update_freq:
                self.refresh()

    # Persistence.

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly as if never stopped, in plain types and CPU tensors; a collective.

        It is the state of all processes together, so that any other number of them can go on from it: finished windows are
        reduced first, and the one under way, if there is one, is summed over processes without touching it.
        """
        self.reduce()
        states = [group.state_dict() for group in self.groups]
        if process_count() > 1 and self._window_micro_batches > 0:
            windows = [[tensor.clone() for tensor in group.statistics.window.tensors()] for group in self.groups]
            counts = [group.counts.unreduced_counts() for group in self.groups]
            own_counts = [count.clone() for count in counts]
            sum_over_processes([*(tensor for window in windows for tensor in window), *counts])
            for state, window, of_all, own in zip(states, windows, counts, own_counts, strict=True):
                state["statistics"]["window"] = [tensor.cpu() for tensor in window]
                for name, others in zip(LayerCounts.SHARED, (of_all - own).cpu(), strict=True):
                    state["counts"][name] += others
        return {
            "groups": states,
            "reprojection_count": self.reprojection_count,
            "micro_batches": self._micro_batches,
            "window_micro_batches": self._window_micro_batches,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: If the state belongs to another adapter layout.
        """
        if self.config.silent_layers == "leave_out":
            heard = {name for saved in state["groups"] for name in saved["layers"]}
            silent = self.layers.keys() - heard
            if silent and heard <= self.layers.keys():
                self.leave_out(silent)
        if len(state["groups"]) != len(self.groups):
            raise InvalidValueError(
                f"Checkpoint: expected {len(self.groups)} rank groups, as this model has, got {len(state['groups'])}. "
                "Use the adapter configuration (r, rank_pattern, target_modules) that the checkpoint was trained with."
            )
        for group, saved in zip(self.groups, state["groups"], strict=True):
            group.load_state_dict(saved)
            if not is_first_process():
                group.statistics.window.clear()  # it holds the sum over all processes
        self.reprojection_count = state["reprojection_count"]
        self._micro_batches = state["micro_batches"]
        self._steps = state["steps"]
        self._window_micro_batches = state["window_micro_batches"]
        self._windows_since_reduce = 0

    def detach(self) -> None:
        """Remove every hook from the model."""
        self._capture.detach()

    def __iter__(self) -> Iterator[LayerView]:
        """Iterate over the layers' views."""
        return iter(self.layers.values())


def _rule_of(x: Tensor) -> F.MapsRule:
    """Return the rule that leaves A as it is and maps B by X `[L, r, r]`."""
    maps = F.ReprojectionMaps(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x), x)
    return lambda a_cov, g_cov, kept, enough_g: maps
