"""Lets the effective rank of every layer follow its spectrum."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import pad

from grit_lightning import functional as F
from grit_lightning.callbacks.base import GeometryCallback
from grit_lightning.callbacks.event_log import EventLog
from grit_lightning.callbacks.reprojection import Mode, maps_rule
from grit_lightning.geometry.rank_group import RankGroup
from grit_lightning.geometry.rank_rules import Layers, RankRule, Rule, Scope, Verdict
from grit_lightning.geometry.rank_space import RankSpaceGeometry


class RankDecision(NamedTuple):
    """One layer at one decision."""

    step: int
    """Optimizer steps taken."""
    layer: str
    old: int
    new: int
    reason: str


class RankAdaptation(GeometryCallback):
    """Sets each layer's effective rank k to the smallest that a rule allows (paper §2.4).

    A reduction takes effect at once, in the basis of the rule: B loses its columns beyond k, so that the adapter's
    function is the one a compacted adapter of rank k computes, while the rows of A stay and go on being measured. Where k
    rises, columns grow from zero, the direction that B's gradient pulls at most first.

    How a dropped direction returns: under `energy` its eigenvalue of Σ_a is still measured, and k rises with it (but the
    frozen rows of A lose weight beside kept ones that grow, however much there is to learn in them). Under
    `balanced` and `kl_budget` its σ is 0 as long as B's column is, whatever the data do. There B's gradient decides,
    which autograd computes for dropped columns too: a direction returns when it promises `return_ratio` times the gain of
    the average kept one (`functional.regrowth`), and at the next decision σ judges what has grown. What was dropped stays
    on the account with the σ it had, so that τ and the budget hold for all decisions together, not anew for each.

    Args:
        rule: `energy`: k = min{m : Σ_{i≤m} λ_i / Σ λ_i ≥ τ} over the eigenvalues of Σ_a (paper). `balanced`: the same over
            σ² of the balancing transform, which no change of gauge alters. `kl_budget`: the smallest k whose predicted
            loss increase ½ Σ_{i>k} σ_i² stays within the budget. The last two are beyond the paper.
        threshold: τ in (0, 1], for `energy` and `balanced`.
        min_rank: Smallest effective rank (paper: min_lora_rank); layers whose r is smaller keep their r.
        start_step: First optimizer step at which ranks may change (paper: rank_adaptation_start_step).
        every_n_steps: Optimizer steps between decisions.
        hysteresis: ε ≥ 0: k falls only if τ + ε of the energy is kept, and rises only if less than τ − ε is; for a
            budget b relative to it, b(1 ∓ ε).
        budget: Allowed increase of the loss in nats per token, for `kl_budget`: of each layer, or of all together.
        scope: `layer` decides layer by layer; `global` holds one threshold or budget over all layers and spends
            parameters where they buy most (needs σ: eigenvalues of Σ_a cannot be compared between layers).
        max_rank: Largest effective rank; None allows the adapter's.
        min_samples: Tokens a layer must have contributed; None takes the geometry's kfac_min_samples, the least allowed.
        energy_ema: β in [0, 1): decay per decision of the average that stands in for the spectrum; 0 takes it as it is.
        entropy_floor: Keep at least exp(entropy of the spectrum) directions.
        mixing_probability: Chance, per layer and decision, that one kept direction, chosen evenly, is zeroed once and
            has to grow back (paper: stochastic subspace mixing).
        seed: Of the mixing, the same on all processes.
        return_ratio: Gain at which a dropped direction returns under `balanced` and `kl_budget`, ≥ 1 (1 is what noise
            alone gives); None never returns one.
        stop_step: Last optimizer step at which ranks may change; None for no end.

    Attributes:
        decisions: The last 10,000 changes, as `RankDecision`. All changes, and how many layers kept their rank for which
            reason, are in `ranks.jsonl` in the run's folder, if the run has loggers.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        rule: Rule = "energy",
        threshold: float = 0.99,
        min_rank: int = 4,
        start_step: int = 0,
        every_n_steps: int = 50,
        hysteresis: float = 0.0,
        budget: float | None = None,
        scope: Scope = "layer",
        max_rank: int | None = None,
        min_samples: int | None = None,
        energy_ema: float = 0.0,
        entropy_floor: bool = False,
        mixing_probability: float = 0.0,
        seed: int = 0,
        return_ratio: float | None = 2.0,
        stop_step: int | None = None,
    ) -> None:
        """Check and remember the settings."""
        super().__init__(every_n_steps, start_step, stop_step, EventLog("ranks.jsonl"))
        _require("rule", rule in ("energy", "balanced", "kl_budget"), "be energy, balanced or kl_budget", rule)
        _require("threshold (τ)", 0.0 < threshold <= 1.0, "lie in (0, 1]", threshold)
        _require("min_rank", min_rank >= 1, "be an integer ≥ 1", min_rank)
        _require("hysteresis (ε)", 0.0 <= hysteresis < 1.0, "lie in [0, 1)", hysteresis)
        _require("scope", scope in ("layer", "global"), "be layer or global", scope)
        _require(
            "scope", scope == "layer" or rule != "energy", "be layer with rule energy (or set rule: balanced)", scope
        )
        needs_budget = "be a number ≥ 0 (nats per token) with rule kl_budget, and null with any other"
        fits = budget is None if rule != "kl_budget" else budget is not None and budget >= 0
        _require("budget", fits, needs_budget, budget)
        _require("max_rank", max_rank is None or max_rank >= min_rank, f"be ≥ min_rank {min_rank}, or null", max_rank)
        _require(
            "min_samples", min_samples is None or min_samples >= 1, "be an integer ≥ 1 (tokens) or null", min_samples
        )
        _require("energy_ema (β)", 0.0 <= energy_ema < 1.0, "lie in [0, 1)", energy_ema)
        _require("mixing_probability", 0.0 <= mixing_probability <= 1.0, "lie in [0, 1]", mixing_probability)
        _require("return_ratio", return_ratio is None or return_ratio >= 1.0, "be a number ≥ 1, or null", return_ratio)
        self.rule: Rule = rule
        self.min_rank = min_rank
        self.min_samples = min_samples
        self.energy_ema = energy_ema
        self.mixing_probability = mixing_probability
        self.return_ratio = None if rule == "energy" else return_ratio
        self.decisions: deque[RankDecision] = deque(maxlen=10_000)
        self._decide = RankRule(rule, scope, threshold, budget or 0.0, min_rank, max_rank, hysteresis, entropy_floor)
        self._shares = rule != "kl_budget" and scope == "layer"  # the average is then that of the energy curve
        self._average: Tensor | None = None
        self._account: Tensor | None = None
        self._generator = torch.Generator().manual_seed(seed)

    # Trainer hooks.

    def validate(self, geometry: RankSpaceGeometry) -> None:
        """Refuse bounds that no layer can have.

        Raises:
            ValueError: If min_rank exceeds the largest LoRA rank, or min_samples undercuts the geometry's.
        """
        largest = max(group.r for group in geometry.groups)
        if self.min_rank > largest:
            raise ValueError(
                f"RankAdaptation.min_rank is {self.min_rank}, but the adapter's rank is {largest}: "
                f"set min_rank to at most {largest}."
            )
        if self.min_samples is not None and self.min_samples < geometry.config.kfac_min_samples:
            raise ValueError(
                f"RankAdaptation.min_samples is {self.min_samples}, but the geometry changes no layer before "
                f"{geometry.config.kfac_min_samples} tokens: raise it, or lower model.geometry.kfac_min_samples."
            )

    def act(self, trainer: pl.Trainer, geometry: RankSpaceGeometry) -> None:
        """Decide, truncate or widen the layers whose rank changes, and say so."""
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        changes, unchanged, mixed = self.adapt(geometry, trainer.global_step, optimizer)
        step = trainer.global_step
        if not trainer.barebones:
            metrics = {"grit/rank_changes": float(len(changes))}
            trainer.lightning_module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)
        summary = {"step": step, "changed": len(changes), "unchanged": unchanged, "mixed": mixed}
        self._record([*(change._asdict() for change in changes), summary])

    # The decision.

    @torch.no_grad()
    def adapt(
        self, geometry: RankSpaceGeometry, step: int, optimizer: torch.optim.Optimizer | None = None
    ) -> tuple[list[RankDecision], dict[str, int], list[str]]:
        """Take one decision for all layers and carry it out.

        Args:
            geometry: Whose ranks to set.
            step: Optimizer steps taken, for the record.
            optimizer: Its moments follow the change of coordinates.

        Returns:
            The changes; reasons of the layers that keep their rank, with their number; names of layers that lost a kept
            direction to mixing.
        """
        geometry.reduce()
        names = list(geometry.layers)
        needed = max(self.min_samples or 0, geometry.config.kfac_min_samples, 1)
        enough = torch.cat([group.counts.tokens.cpu() >= needed for group in geometry.groups])
        layers = self._layers(geometry, enough)
        verdict = self._let_return(
            geometry, layers, self._decide(layers._replace(values=self._averaged(layers, enough)))
        )
        decisions = [
            RankDecision(step, name, old, new, reason)
            if ready
            else RankDecision(step, name, old, old, "too few samples")
            for name, old, new, reason, ready in zip(
                names, layers.current.tolist(), *verdict, enough.tolist(), strict=True
            )
        ]
        new = torch.tensor([decision.new for decision in decisions])
        left_out = self._left_out(names, layers.current, new, enough, layers.values.shape[-1])
        mode: Mode = "one_sided" if self.rule == "energy" else "balanced"
        ranks = {decision.layer: decision.new for decision in decisions}
        geometry.set_ranks(maps_rule(mode), ranks, masked_coordinate=left_out, optimizer=optimizer)
        if self._account is not None:  # directions that returned are judged by what they become
            self._account *= ~F.rank_mask(new, self._account.shape[-1])
        changes = [decision for decision in decisions if decision.old != decision.new]
        self.decisions.extend(changes)
        unchanged = Counter(decision.reason for decision in decisions if decision.old == decision.new)
        return changes, dict(unchanged), sorted(left_out)

    def _layers(self, geometry: RankSpaceGeometry, enough: Tensor) -> Layers:
        """Spectra and bounds of all layers; σ² of dropped directions is what it was when they were dropped."""
        groups, widest = geometry.groups, max(group.r for group in geometry.groups)
        values = torch.cat([pad(self._spectrum(group), (0, widest - group.r)) for group in groups])
        current = torch.cat([group.ranks for group in groups])
        if self.rule != "energy":
            kept = F.rank_mask(current, widest)
            dropped = torch.zeros_like(values) if self._account is None else self._account
            self._account = torch.where(kept, values, dropped)
            values = self._account.sort(dim=-1, descending=True).values
        return Layers(
            values=values.masked_fill(~enough.unsqueeze(-1), 0.0),
            current=current,
            allocated=torch.cat([torch.full((len(group.sites),), group.r) for group in groups]),
            costs=torch.tensor([site.parameters_per_rank for group in groups for site in group.sites]),
        )

    def _spectrum(self, group: RankGroup) -> Tensor:
        a_cov, g_cov = group.a_cov.cpu(), group.g_cov.cpu()
        if self.rule == "energy":
            return F.eigenbasis(a_cov)[0]
        return F.balancing_transform(a_cov, g_cov)[2].square()

    def _averaged(self, layers: Layers, enough: Tensor) -> Tensor:
        """The running average of the spectra `[L, r]`, which starts with the first that is there."""
        values = layers.values
        if self.energy_ema == 0.0:
            return values
        if self._shares:
            total = values.sum(-1, keepdim=True)
            values = values / torch.where(total > 0, total, 1.0)
        before = values if self._average is None else self._average
        before = torch.where(before.sum(-1, keepdim=True) > 0, before, values)
        fresh = values.sum(-1, keepdim=True) > 0
        self._average = torch.where(fresh, self.energy_ema * before + (1.0 - self.energy_ema) * values, before)
        return self._average

    def _let_return(self, geometry: RankSpaceGeometry, layers: Layers, verdict: Verdict) -> Verdict:
        """Raise layers that the rule would not lower and whose dropped directions promise more than the kept ones."""
        if self.return_ratio is None or not bool((layers.current < layers.allocated).any()):
            return verdict
        gains = [
            row
            for group in geometry.groups
            for row in F.regrowth(group.a_cov.cpu(), group.statistics.gradient_gram.cpu(), group.ranks).gain
        ]
        ranks, reasons = list(verdict.ranks), list(verdict.reasons)
        for index, (gain, old) in enumerate(zip(gains, layers.current.tolist(), strict=True)):
            promising = int((gain > self.return_ratio).sum())
            new = min(old + promising, self._decide.max_rank or len(gain))
            if ranks[index] >= old and new > ranks[index]:
                ranks[index] = new
                reasons[index] = (
                    f"gain {float(gain.max()):.3g} of a dropped direction > return_ratio {self.return_ratio:g}"
                )
        return Verdict(ranks, reasons)

    def _left_out(self, names: list[str], current: Tensor, new: Tensor, enough: Tensor, widest: int) -> dict[str, int]:
        """By layer, the kept coordinate that mixing zeroes; layers whose rank rises keep all."""
        if self.mixing_probability == 0.0:
            return {}
        mask = F.subspace_mixing_mask(new, widest, self.mixing_probability, self._generator)
        holes = F.rank_mask(new, widest) & ~mask & (enough & (new <= current)).unsqueeze(-1)
        return {names[layer]: coordinate for layer, coordinate in holes.nonzero().tolist()}

    # Persistence.

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks apart in a checkpoint."""
        return self._generate_state_key(rule=self.rule, scope=self._decide.scope)

    def state_dict(self) -> dict[str, Any]:
        """Averages, account and generator, so that a resumed run decides as the uninterrupted one."""
        return {"average": self._average, "account": self._account, "generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._average, self._account = state_dict["average"], state_dict["account"]
        self._generator.set_state(state_dict["generator"].cpu())


def _require(setting: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"RankAdaptation.{setting} must {expected}, got {got!r}.")
