"""State of all layers that share one LoRA rank, stacked so that every operation is one batched call.

Shapes: L layers of the group, r their rank; statistics `[L, r, r]` float32 on the adapter's device, ranks on the CPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from grit_lightning import functional as F
from grit_lightning.geometry.quantization import relative_quantization_noise
from grit_lightning.geometry.sites import LoraSite


class Statistics:
    """Token-weighted sums of a aᵀ and g gᵀ `[L, r, r]` with the weight `[L]` (tokens) they were summed over."""

    def __init__(self, layers: int, r: int) -> None:
        """Start empty."""
        self.a = torch.zeros(layers, r, r)
        self.g = torch.zeros(layers, r, r)
        self.weight = torch.zeros(layers)

    def tensors(self) -> list[Tensor]:
        """The three tensors, for transport and persistence."""
        return [self.a, self.g, self.weight]

    def to(self, device: torch.device) -> None:
        """Move to `device`."""
        self.a, self.g, self.weight = (tensor.to(device) for tensor in self.tensors())

    def absorb(self, other: Statistics, decay: float = 1.0) -> None:
        """Fade what is here by `decay`, add `other` and empty it."""
        self.a = F.accumulate(self.a, other.a, decay)
        self.g = F.accumulate(self.g, other.g, decay)
        self.weight = F.accumulate(self.weight, other.weight, decay)
        other.clear()

    def clear(self) -> None:
        """Set to zero in place."""
        for tensor in self.tensors():
            tensor.zero_()


class RankGroup:
    """Stacked statistics, inverses and effective ranks of the layers with one rank.

    Attributes:
        sites: The adapted layers, in the order of the leading dimension.
        r: Their allocated rank.
        micro: Sums of the micro-batch under way.
        window: Finite micro-batches of the accumulation window under way.
        local: Finished windows of this process that have not been summed over processes yet.
        total: The running estimate, equal on all processes.
        tokens: `[L]` int64, tokens behind `total` and `local`, never faded.
        rejected: `[L]` int64, micro-batches left out because they were not finite.
        heard: `[L]` int64, uses of the layer that have sent statistics. This and the two counts above are of all processes
            as of the last time that these told each other, and of this process since.
        fallbacks: `[L]` int64, gradients of A or B whose preconditioned version was not finite, so that the raw one was used.
        escalations: `[L]` int64, rungs of the damping ladder climbed at refreshes.
        ranks: `[L]` int64 on the CPU, effective rank k: the first k coordinates carry the adapter.
        a_inverse: `[L, r, r]`, (Σ_a + λI)⁻¹ as of the last refresh.
        g_inverse: `[L, r, r]`, (Σ_g + λI)⁻¹ as of the last refresh.
        a_basis: `[L, r, r]`, eigenvectors of Σ_a as of the last refresh, if the optimizer wants them.
        g_basis: `[L, r, r]`, eigenvectors of Σ_g, likewise.
        basis_version: Counts refreshes of the bases.
        natural: Whether the optimizer was last handed preconditioned gradients, so that its moments average those.
        gradient_gram: `[L, r, r]`, ∇Bᵀ∇B summed over the steps taken at a reduced rank, fading like the statistics: the
            only evidence that there is on dropped directions.
        references: Matrices `[L, r, r]` by name that follow every change of coordinates as Σ_a does, for comparison later.
        penalty: `[L, r, r]`, the quadratic forms of the regularisers as of the last refresh; None while they are off.
        ready: `[L]` bool, layers whose inverses and bases may be applied; `any_ready` whether there is one.
    """

    SHARED_COUNTS = ("tokens", "rejected", "heard")
    PERSISTENT = (
        *SHARED_COUNTS,
        *("fallbacks", "escalations", "ranks"),
        *("a_inverse", "g_inverse", "a_basis", "g_basis", "ready", "gradient_gram"),
    )

    def __init__(self, sites: Sequence[LoraSite]) -> None:
        """Allocate empty state for `sites`, which share one rank."""
        self.sites = list(sites)
        self.r = self.sites[0].r
        layers = len(self.sites)
        self.micro, self.window, self.local, self.total = (Statistics(layers, self.r) for _ in range(4))
        self.tokens = torch.zeros(layers, dtype=torch.int64)
        self.rejected = torch.zeros(layers, dtype=torch.int64)
        self.heard = torch.zeros(layers, dtype=torch.int64)
        self._told = torch.zeros(len(self.SHARED_COUNTS), layers, dtype=torch.int64)
        self.fallbacks = torch.zeros(layers, dtype=torch.int64)
        self.escalations = torch.zeros(layers, dtype=torch.int64)
        self.ranks = torch.full((layers,), self.r, dtype=torch.int64)
        identity = torch.eye(self.r).expand(layers, self.r, self.r)
        self.a_inverse, self.g_inverse = identity.clone(), identity.clone()
        self.a_basis, self.g_basis = identity.clone(), identity.clone()
        self.basis_version = 0
        self.gradient_gram = torch.zeros(layers, self.r, self.r)
        self.references: dict[str, Tensor] = {}
        self.ready = torch.zeros(layers, dtype=torch.bool)
        self.any_ready = False
        self.natural = False
        self.penalty: Tensor | None = None
        self.calls = [0] * layers

    # Counts of several processes.

    def counts_to_tell(self) -> Tensor:
        """`SHARED_COUNTS` `[3, L]` int64 of this process since the other ones have been told."""
        return torch.stack([getattr(self, name) for name in self.SHARED_COUNTS]) - self._told

    def take_counts(self, of_all: Tensor) -> None:
        """Take what `counts_to_tell` sums to over all processes `[3, L]`."""
        self._told = self._told + of_all
        for name, counts in zip(self.SHARED_COUNTS, self._told.clone(), strict=True):
            setattr(self, name, counts)

    # Placement and persistence.

    @property
    def device(self) -> torch.device:
        """Device of the statistics."""
        return self.total.a.device

    def to(self, device: torch.device) -> None:
        """Move everything but the ranks, which only the CPU reads."""
        for statistics in (self.micro, self.window, self.local, self.total):
            statistics.to(device)
        for name in self.PERSISTENT:
            if name != "ranks":
                setattr(self, name, getattr(self, name).to(device))
        self._told = self._told.to(device)
        self.references = {name: tensor.to(device) for name, tensor in self.references.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as plain tensors, lists and names."""
        state: dict[str, Any] = {name: getattr(self, name).detach().cpu().clone() for name in self.PERSISTENT}
        for part in ("window", "local", "total"):
            state[part] = [tensor.detach().cpu().clone() for tensor in getattr(self, part).tensors()]
        names = [site.name for site in self.sites]
        return state | {
            "layers": names,
            "basis_version": self.basis_version,
            "references": {name: tensor.detach().cpu().clone() for name, tensor in self.references.items()},
            "natural": self.natural,
            "penalty": None if self.penalty is None else self.penalty.detach().cpu().clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: If the state belongs to other layers or another rank.
        """
        names = [site.name for site in self.sites]
        if state["layers"] != names or state["total"][0].shape != self.total.a.shape:
            raise ValueError(
                f"The checkpoint holds statistics of {len(state['layers'])} layers with shape "
                f"{tuple(state['total'][0].shape)}, this model has {len(names)} with shape {tuple(self.total.a.shape)}. "
                "Use the adapter configuration (r, target_modules) that the checkpoint was trained with."
            )
        for name in self.PERSISTENT:
            setattr(self, name, state[name].to(getattr(self, name).device).clone())
        self.any_ready = bool(self.ready.any())
        for part in ("window", "local", "total"):
            target: Statistics = getattr(self, part)
            for tensor, value in zip(target.tensors(), state[part], strict=True):
                tensor.copy_(value)
        self._told = torch.stack([getattr(self, name) for name in self.SHARED_COUNTS])
        self.basis_version = state["basis_version"]
        self.references = {name: tensor.to(self.device).clone() for name, tensor in state["references"].items()}
        self.natural = state["natural"]
        self.penalty = None if state["penalty"] is None else state["penalty"].to(self.device)

    # Views.

    @property
    def a_cov(self) -> Tensor:
        """Σ_a, the current estimate `[L, r, r]`."""
        return F.covariance(self.total.a, self.total.weight)

    @property
    def g_cov(self) -> Tensor:
        """Σ_g, the current estimate `[L, r, r]`."""
        return F.covariance(self.total.g, self.total.weight)

    @property
    def counters(self) -> dict[str, list[int]]:
        """`rejected`, `fallbacks` and `escalations` by layer; one transfer each."""
        return {name: getattr(self, name).tolist() for name in ("rejected", "fallbacks", "escalations")}

    @property
    def kept(self) -> Tensor:
        """`[L, r]` bool on the statistics' device: coordinates below the effective rank."""
        return F.rank_mask(self.ranks, self.r).to(self.device)

    def observe_gradients(self, gradients: Tensor, layers: Tensor, decay: float) -> None:
        """Add raw gradients of B `[n, d_out, r]` of the layers `[n]` to their `gradient_gram`, unless they are not finite."""
        gram = gradients.mT @ gradients
        gram = torch.where(gram.isfinite().all(-1).all(-1).view(-1, 1, 1), gram, 0.0)
        self.gradient_gram[layers] = decay * self.gradient_gram[layers] + gram

    @cached_property
    def quantization_noise(self) -> Tensor:
        """`[L]` relative squared error of the quantised base layers; measured once, zero for dense ones."""
        return torch.tensor([relative_quantization_noise(site.base) for site in self.sites])

    # Batched access to the factors, bucketed by shape.

    def factors(self, side: str) -> list[Tensor]:
        """The parameters of one side: `a` gives A `[r, d_in]`, `b` gives B `[d_out, r]`."""
        return [(site.down if side == "a" else site.up).weight for site in self.sites]

    def apply(self, side: str, read: Callable[[Tensor], Tensor | None], update: BatchedUpdate) -> None:
        """Read one tensor a layer, update those of equal shape in one batched call, and write them back in place.

        Args:
            side: `a` or `b`.
            read: Takes a factor, returns the tensor to update (its data, its gradient …) or None to leave it out.
            update: Maps a stack `[n, ...]` and the indices `[n]` of its layers to the new stack.
        """
        buckets: dict[torch.Size, list[tuple[int, Tensor]]] = defaultdict(list)
        for index, factor in enumerate(self.factors(side)):
            tensor = read(factor)
            if tensor is not None:
                buckets[tensor.shape].append((index, tensor))
        for members in buckets.values():
            indices = torch.tensor([index for index, _ in members])
            tensors = [tensor for _, tensor in members]
            updated = update(torch.stack(tensors), indices.to(self.device))
            torch._foreach_copy_(tensors, list(updated.to(tensors[0].dtype).unbind(0)))


BatchedUpdate = Callable[[Tensor, Tensor], Tensor]


def group_by_rank(sites: Iterable[LoraSite]) -> list[RankGroup]:
    """Split layers into one group a rank, in order of first appearance."""
    by_rank: dict[int, list[LoraSite]] = defaultdict(list)
    for site in sites:
        by_rank[site.r].append(site)
    return [RankGroup(members) for members in by_rank.values()]
