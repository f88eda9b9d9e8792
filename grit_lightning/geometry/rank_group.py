"""All layers that share one LoRA rank, stacked so that every operation is one batched call.

    RankGroup ── statistics   what was measured                 (`RunningStatistics`)
              ── counts       how often                         (`LayerCounts`)
              ── derived      inverses and bases, replaced as a whole at a refresh   (`Derived`)
              ── ranks        how many directions are in force

Shapes: L layers of the group, r their rank. Only `grit_lightning.geometry` writes any of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from grit_lightning import functional as F
from grit_lightning.errors import InvalidValueError
from grit_lightning.geometry.derived import Derived
from grit_lightning.geometry.quantization import relative_quantization_noise
from grit_lightning.geometry.sites import LoraSite, Side
from grit_lightning.geometry.statistics import LayerCounts, RunningStatistics

ReadTensor = Callable[[Tensor], Tensor | None]
"""Takes a factor and returns the tensor to update (its data, its gradient …), or None to leave it out."""
UpdatePair = Callable[[Tensor | None, Tensor | None, Tensor], tuple[Tensor | None, Tensor | None]]
"""`(of A [n, r, d_in], of B [n, d_out, r], layers [n]) → both, updated`; None where a factor was left out."""


class RankGroup:
    """Statistics, derived quantities and effective ranks of the layers with one rank.

    Attributes:
        sites: The adapted layers, in the order of the leading dimension.
        r: Their allocated rank.
        statistics: What was measured.
        counts: Tokens, captures and events of each layer.
        derived: What the last refresh made of the statistics.
        ranks: `[L]` int64 on the CPU, effective rank k: the first k coordinates carry the adapter.
        calls: Uses of each layer in the micro-batch under way.
        quantization_noise: `[L]` relative squared error of the quantised base layers, once it has been measured.
        last_step_preconditioned: Whether the optimizer was last handed preconditioned gradients, so that its moments
            average those.
        judged_by: Returns the Σ_g `[L, r, r]` by which directions are put in order, where it is another than the measured one.
    """

    def __init__(self, sites: Sequence[LoraSite]) -> None:
        """Allocate empty state for `sites`, which share one rank."""
        self.sites = list(sites)
        self.r = self.sites[0].r
        layers = len(self.sites)
        self.statistics = RunningStatistics(layers, self.r)
        self.counts = LayerCounts(layers)
        self.derived = Derived.before_any_refresh(layers, self.r)
        self.ranks = torch.full((layers,), self.r, dtype=torch.int64, device="cpu")  # numbers, also on the meta device
        self.calls = [0] * layers
        self.quantization_noise: Tensor | None = None
        self.last_step_preconditioned = False
        self.judged_by: Callable[[], Tensor] | None = None

    # Reading.

    @property
    def device(self) -> torch.device:
        """Device of the statistics."""
        return self.statistics.total.a.device

    @property
    def a_cov(self) -> Tensor:
        """Σ_a, the current estimate `[L, r, r]`."""
        return F.covariance(self.statistics.total.a, self.statistics.total.weight)

    @property
    def g_cov(self) -> Tensor:
        """Σ_g, the current estimate `[L, r, r]`."""
        return F.covariance(self.statistics.total.g, self.statistics.total.weight)

    @property
    def judged_g_cov(self) -> Tensor:
        """The Σ_g `[L, r, r]` by which reprojection and ranks put directions in order."""
        return self.g_cov if self.judged_by is None else self.judged_by()

    @property
    def kept(self) -> Tensor:
        """`[L, r]` bool on the statistics' device: coordinates below the effective rank."""
        return F.rank_mask(self.ranks, self.r).to(self.device)

    def reference(self, name: str) -> Tensor:
        """Return the matrices `[L, r, r]` kept under `name`; zero for layers without one."""
        return self.statistics.references.get(name, torch.zeros_like(self.statistics.total.a))

    def keep_reference(self, name: str, layers: Tensor | None = None) -> None:
        """Keep Σ_a under `name`, to compare a later one with; it follows every change of coordinates.

        Args:
            name: Of the reference.
            layers: `[L]` bool, layers whose reference is replaced; None replaces all.
        """
        a_cov = self.a_cov.clone()
        new = a_cov if layers is None else torch.where(layers.view(-1, 1, 1), a_cov, self.reference(name))
        self.statistics.references[name] = new

    # The micro-batch under way.

    def start_micro_batch(self) -> None:
        """Forget the micro-batch before."""
        self.statistics.micro.clear()
        self.calls = [0] * len(self.sites)

    def finish_micro_batch(self, tokens: Tensor) -> None:
        """Take the micro-batch into the window; layers whose sums are not finite are left out and counted.

        Args:
            tokens: Real tokens of the micro-batch, a scalar.
        """
        micro = self.statistics.micro
        calls = torch.tensor(self.calls, device=self.device)
        finite = F.finite_layers(micro.a, micro.g)
        self.counts.rejected += ~finite & (calls > 0)
        micro.weight = (calls * tokens).float()
        micro.keep_where(finite)
        self.statistics.window.accumulate(micro)
        self.counts.capture_counts += calls

    def finish_window(self, decay: float) -> None:
        """Take the window into this process's own sums, which fade by `decay`."""
        self.counts.tokens += self.statistics.window.weight.long()
        self.statistics.local.accumulate(self.statistics.window, decay)

    def measure_quantization_noise(self) -> None:
        """Measure how far the quantised base layers are from what they stand for; zero for dense ones."""
        noise = [relative_quantization_noise(site.base) for site in self.sites]
        self.quantization_noise = torch.tensor(noise, dtype=torch.float32)

    # Batched access to the factors.

    def factors(self, side: Side) -> list[Tensor]:
        """Return the parameters of one side: `a` gives A `[r, d_in]`, `b` gives B `[d_out, r]`."""
        return [(site.down if side == "a" else site.up).weight for site in self.sites]

    def update_pairs(self, read: ReadTensor, update: UpdatePair) -> None:
        """Read a tensor of A and one of B of every layer, update equal shapes in one batched call, write back in place.

        Args:
            read: Which tensor of a factor.
            update: What becomes of the stacked pairs.
        """
        buckets: dict[Any, list[tuple[int, Tensor | None, Tensor | None]]] = defaultdict(list)
        for index, (a, b) in enumerate(zip(self.factors("a"), self.factors("b"), strict=True)):
            of_a, of_b = read(a), read(b)
            shapes = tuple(None if tensor is None else tensor.shape for tensor in (of_a, of_b))
            buckets[shapes].append((index, of_a, of_b))
        for members in buckets.values():
            layers = torch.tensor([index for index, _, _ in members]).to(self.device)
            all_a = [of_a for _, of_a, _ in members if of_a is not None]
            all_b = [of_b for _, _, of_b in members if of_b is not None]
            if not all_a and not all_b:
                continue
            updated = update(torch.stack(all_a) if all_a else None, torch.stack(all_b) if all_b else None, layers)
            for tensors, new in zip((all_a, all_b), updated, strict=True):
                if new is not None:
                    torch._foreach_copy_(tensors, list(new.to(tensors[0].dtype).unbind(0)))

    # Placement and persistence.

    def to(self, device: torch.device) -> None:
        """Move everything but the ranks, which only the CPU reads."""
        self.statistics.to(device)
        self.counts.to(device)
        self.derived = self.derived.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, as plain tensors, lists and names."""
        return {
            "layers": [site.name for site in self.sites],
            "statistics": self.statistics.state_dict(),
            "counts": self.counts.state_dict(),
            "derived": self.derived.state_dict(),
            "ranks": self.ranks.clone(),
            "last_step_preconditioned": self.last_step_preconditioned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: If the state belongs to other layers or another rank.
        """
        names, shape = [site.name for site in self.sites], state["statistics"]["total"][0].shape
        if state["layers"] != names or shape != self.statistics.total.a.shape:
            raise InvalidValueError(
                f"Checkpoint: expected statistics of {len(names)} layers with shape {tuple(self.statistics.total.a.shape)}, as "
                f"this model has, got {len(state['layers'])} with shape {tuple(shape)}. "
                "Use the adapter configuration (r, target_modules) that the checkpoint was trained with."
            )
        self.statistics.load_state_dict(state["statistics"])
        self.counts.load_state_dict(state["counts"])
        self.derived = Derived.from_state_dict(state["derived"], self.device)
        self.ranks = state["ranks"].clone()
        self.last_step_preconditioned = state["last_step_preconditioned"]


def group_by_rank(sites: Iterable[LoraSite]) -> list[RankGroup]:
    """Split layers into one group a rank, in order of first appearance."""
    by_rank: dict[int, list[LoraSite]] = defaultdict(list)
    for site in sites:
        by_rank[site.r].append(site)
    return [RankGroup(members) for members in by_rank.values()]
