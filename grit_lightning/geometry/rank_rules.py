"""Rank rules: from the spectra of all layers to the smallest ranks that each rule allows, and the reason in words.

A rule is a policy without state, chosen by its name in `RANK_RULES`. It says which spectrum it judges (`spectrum`), which
ranks it wants (`ranks`), why (`explain`), and in its class attributes what that spectrum is good for. To add one, write the
class, put it into the dict and describe it in `callbacks.RankAdaptation`; nothing else asks for a rule by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from grit_lightning import functional as F

Scope = Literal["layer", "global"]


class LayerSpectra(NamedTuple):
    """What a rule has to know of all L layers, on the CPU; spectra are padded with zeros to the largest r."""

    values: Tensor
    """`[L, r]` descending: the rule's `spectrum`; zero where nothing is known."""
    current: Tensor
    """`[L]` int64, ranks in force."""
    allocated: Tensor
    """`[L]` int64, LoRA ranks r."""
    costs: Tensor
    """`[L]` int64, parameters of one direction, d_in + d_out."""


@dataclass(frozen=True)
class RankRule(ABC):
    """What all rank rules share.

    Args:
        limit: What the rule holds to: a share of the energy in (0, 1], or a budget where `needs_budget`.
        scope: `layer` holds every layer to the limit; `global` holds all of them together and spends parameters where they
            buy most.
    """

    reprojection_mode: ClassVar[F.ReprojectionMode]
    """Which reprojection puts the directions of the spectrum in order, so that the first k can be kept."""
    comparable_between_layers: ClassVar[bool]
    """Whether spectra of different layers have one unit: scope `global` needs that."""
    measures_dropped: ClassVar[bool]
    """Whether a direction that was dropped still shows in the spectrum. If not, it is remembered as it was when it was
    dropped, and B's gradient says whether it should return (`functional.regrowth`)."""
    needs_budget: ClassVar[bool]
    """Whether `limit` is a budget, in nats per token."""

    limit: float
    scope: Scope = "layer"

    @property
    def averages_energy_share(self) -> bool:
        """Whether a running average should be that of shares of the energy, not of the spectrum as it is."""
        return False

    @abstractmethod
    def spectrum(self, a_cov: Tensor, g_cov: Tensor) -> Tensor:
        """Return what the rule judges, `[L, r]` descending, of Σ_a and Σ_g, both `[L, r, r]`."""

    @abstractmethod
    def ranks(self, layers: LayerSpectra, cap: Tensor, lowest: int, margin: float = 0.0) -> Tensor:
        """Return the smallest ranks within the limit.

        Args:
            layers: The spectra.
            cap: `[L]` int64, largest ranks.
            lowest: Smallest rank of any layer.
            margin: ε of the hysteresis. Above zero the limit is held with that much to spare, below zero it may be missed
                by as much.

        Returns:
            Ranks, int64 `[L]`; `cap` for layers without a spectrum.
        """

    @abstractmethod
    def explain(self, values: Tensor, old: int, new: int, hysteresis: float) -> str:
        """Say which number moved the rank of one layer, with spectrum `[1, r]`, from `old` to `new`."""

    def _at(self, k: int) -> str:
        return f"over all layers, here at k={k}" if self.scope == "global" else f"at k={k}"


class EnergyThresholdRule(RankRule):
    """Keep the share `limit`, τ, of the energy: k = min{m : Σ_{i≤m} λ_i / Σ λ_i ≥ τ}, and τ ± ε with a margin."""

    needs_budget = False

    @property
    def averages_energy_share(self) -> bool:
        """Of one layer, the average is that of the energy curve; of all layers together, that of the energies."""
        return self.scope == "layer"

    def ranks(self, layers: LayerSpectra, cap: Tensor, lowest: int, margin: float = 0.0) -> Tensor:
        """Return the smallest ranks that keep the share τ of the energy."""
        threshold = min(max(self.limit + margin, 1e-6), 1.0)
        if self.scope == "global":
            return F.global_energy_rank(layers.values, threshold, layers.costs, lowest, cap)
        return F.rank_from_energy(F.cumulative_energy(layers.values), threshold, lowest, cap)

    def explain(self, values: Tensor, old: int, new: int, hysteresis: float) -> str:
        """Say what share of the energy the smaller of the two ranks keeps."""
        falls = new < old
        k = new if falls else old
        threshold = min(self.limit + (hysteresis if falls else -hysteresis), 1)
        energy = float(F.cumulative_energy(values)[0, k - 1])
        if self.scope == "global":
            return f"energy kept at τ {threshold:g} {self._at(new)} (this layer's was {energy:.3f})"
        return f"energy {energy:.3f} {'≥' if falls else '<'} τ {threshold:g} {self._at(k)}"


class EnergyRule(EnergyThresholdRule):
    """The paper's rule: the energy of Σ_a. Its eigenvalues depend on the gauge, so layers cannot be compared by them."""

    reprojection_mode = F.ReprojectionMode.ONE_SIDED
    comparable_between_layers = False
    measures_dropped = True

    def spectrum(self, a_cov: Tensor, g_cov: Tensor) -> Tensor:
        """Return the eigenvalues of Σ_a."""
        return F.eigenbasis(a_cov)[0]


class BalancedRule(EnergyThresholdRule):
    """The energy of σ², twice the loss that each direction of the balancing transform costs (beyond the paper)."""

    reprojection_mode = F.ReprojectionMode.BALANCED
    comparable_between_layers = True
    measures_dropped = False

    def spectrum(self, a_cov: Tensor, g_cov: Tensor) -> Tensor:
        """Return σ²."""
        return F.balancing_transform(a_cov, g_cov)[2].square()


class LossBudgetRule(RankRule):
    """Lose at most `limit`, b nats per token, by prediction: ½ Σ_{i>k} σ_i² ≤ b, with a margin b(1 ∓ ε) (beyond the paper)."""

    reprojection_mode = F.ReprojectionMode.BALANCED
    comparable_between_layers = True
    measures_dropped = False
    needs_budget = True

    def spectrum(self, a_cov: Tensor, g_cov: Tensor) -> Tensor:
        """Return σ²."""
        return F.balancing_transform(a_cov, g_cov)[2].square()

    def ranks(self, layers: LayerSpectra, cap: Tensor, lowest: int, margin: float = 0.0) -> Tensor:
        """Return the smallest ranks whose predicted loss stays within the budget."""
        sigma, budget = layers.values.sqrt(), self.limit * (1.0 - margin)
        if self.scope == "global":
            return F.global_budget_rank(sigma, budget, layers.costs, lowest, cap)
        return F.budget_rank(sigma, budget, lowest, cap)

    def explain(self, values: Tensor, old: int, new: int, hysteresis: float) -> str:
        """Say what the smaller of the two ranks costs."""
        falls = new < old
        k = new if falls else old
        cost = float(F.truncation_cost(values.sqrt(), k))
        budget = self.limit * (1 - (hysteresis if falls else -hysteresis))
        return f"cost {cost:.3g} {'≤' if falls else '>'} budget {budget:.3g} {self._at(k)}"


RANK_RULES: dict[str, type[RankRule]] = {
    "energy": EnergyRule,
    "balanced": BalancedRule,
    "kl_budget": LossBudgetRule,
}
"""Rank rules by the name that `callbacks.RankAdaptation` takes."""
