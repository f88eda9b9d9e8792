"""Lets the effective rank of every layer follow its spectrum."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any, NamedTuple, get_args

import lightning.pytorch as pl
import torch

from grit_lightning import functional as F
from grit_lightning.callbacks.base import GeometryCallback, ScheduledCallback, one_of
from grit_lightning.callbacks.event_log import EventLog
from grit_lightning.errors import InvalidValueError, require
from grit_lightning.geometry.rank_proposal import RankGuards
from grit_lightning.geometry.rank_rules import RANK_RULES, RankRule, Scope
from grit_lightning.geometry.rank_selection import RankSelector
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.ignored_settings import warn_if_ignored

OWNER = "RankAdaptation"  # of the settings, in messages


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
    the average kept one (`functional.regrowth`), and at the next decision σ judges what has grown. What was dropped is
    remembered with the σ it had, so that τ and the budget hold for all decisions together, not anew for each.

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

    changes_coordinates = True

    def __init__(
        self,
        rule: str = "energy",
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
        require(OWNER, "threshold (τ)", 0.0 < threshold <= 1.0, "a number in (0, 1]", threshold)
        require(OWNER, "min_rank", min_rank >= 1, "an integer ≥ 1", min_rank)
        require(OWNER, "hysteresis (ε)", 0.0 <= hysteresis < 1.0, "a number in [0, 1)", hysteresis)
        require(
            OWNER,
            "max_rank",
            max_rank is None or max_rank >= min_rank,
            f"an integer ≥ min_rank {min_rank}, or null",
            max_rank,
        )
        tokens = min_samples is None or min_samples >= 1
        require(OWNER, "min_samples", tokens, "an integer ≥ 1 (tokens) or null", min_samples)
        require(OWNER, "energy_ema (β)", 0.0 <= energy_ema < 1.0, "a number in [0, 1)", energy_ema)
        require(
            OWNER,
            "mixing_probability",
            0.0 <= mixing_probability <= 1.0,
            "a number in [0, 1]",
            mixing_probability,
        )
        require(
            OWNER,
            "return_ratio",
            return_ratio is None or return_ratio >= 1.0,
            "a number ≥ 1, or null",
            return_ratio,
        )
        self.rule = rule
        self.scope = scope
        self.min_rank = min_rank
        self.min_samples = min_samples
        self._ignored_if_given = {"threshold": threshold, "return_ratio": return_ratio, "seed": seed}
        self.decisions: deque[RankDecision] = deque(maxlen=10_000)
        self._selector = RankSelector(
            self._make_rule(rule, threshold, budget, scope),
            RankGuards(min_rank, max_rank, hysteresis, entropy_floor),
            energy_ema=energy_ema,
            return_ratio=return_ratio,
            mixing_probability=mixing_probability,
            seed=seed,
        )

    def _make_rule(self, name: str, threshold: float, budget: float | None, scope: Scope) -> RankRule:
        require(OWNER, "rule", name in RANK_RULES, one_of(RANK_RULES), name)
        rule = RANK_RULES[name]
        require(OWNER, "scope", scope in get_args(Scope), one_of(get_args(Scope)), scope)
        others = ", ".join(other for other, kind in RANK_RULES.items() if kind.comparable_between_layers)
        layerwise = f"layer with rule {name} (global takes one of {others})"
        require(OWNER, "scope", scope == "layer" or rule.comparable_between_layers, layerwise, scope)
        if not rule.needs_budget:
            require(OWNER, "budget", budget is None, f"null with rule {name}", budget)
            return rule(threshold, scope)
        require(
            OWNER,
            "budget",
            budget is not None and budget >= 0,
            f"a number ≥ 0 (nats per token) with rule {name}",
            budget,
        )
        return rule(budget or 0.0, scope)

    # Trainer hooks.

    def validate(self, geometry: RankSpaceGeometry) -> None:
        """Refuse bounds that no layer can have, and say which settings nothing reads.

        Raises:
            ValueError: If min_rank exceeds the largest LoRA rank, or min_samples undercuts the geometry's.
        """
        largest = max(group.r for group in geometry.groups)
        if self.min_rank > largest:
            raise InvalidValueError(
                f"RankAdaptation.min_rank: expected at most the adapter's rank {largest}, got {self.min_rank}. Lower it, or "
                "raise adapter.r."
            )
        if self.min_samples is not None and self.min_samples < geometry.config.kfac_min_samples:
            raise InvalidValueError(
                f"RankAdaptation.min_samples: expected at least {geometry.config.kfac_min_samples} tokens, before which the "
                f"geometry changes no layer, got {self.min_samples}. Raise it, or lower model.geometry.kfac_min_samples."
            )
        readers = {}
        if self._selector.rule.needs_budget:
            readers["threshold"] = "rule: energy or balanced"
        if self._selector.rule.measures_dropped:
            readers["return_ratio"] = "rule: balanced or kl_budget"
        if self._selector.mixing_probability == 0.0:
            readers["seed"] = "mixing_probability above 0"
        warn_if_ignored(RankAdaptation, self._ignored_if_given, readers)

    def validate_beside(self, others: list[ScheduledCallback]) -> None:
        """Refuse two of these that set ranks at the same time.

        Raises:
            ValueError: If there is another one whose schedule overlaps.
        """
        if any(isinstance(other, RankAdaptation) and self.overlaps(other) for other in others):
            raise InvalidValueError(
                f"{OWNER}: expected one at a time, got two whose schedules overlap, so that each would undo the other's ranks. "
                "Remove one, or set stop_step of the first below start_step of the second."
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
        self._log_events([*(change._asdict() for change in changes), summary])

    @torch.no_grad()
    def adapt(
        self, geometry: RankSpaceGeometry, step: int, optimizer: torch.optim.Optimizer | None = None
    ) -> tuple[list[RankDecision], dict[str, int], list[str]]:
        """Take one decision for all layers and carry it out.

        Args:
            geometry: Whose ranks to set.
            step: Optimizer steps taken, to be noted with each decision.
            optimizer: Its moments follow the change of coordinates.

        Returns:
            The changes; reasons of the layers that keep their rank, with their number; names of layers that lost a kept
            direction to mixing.
        """
        geometry.reduce()
        choice = self._selector.choose(geometry, max(self.min_samples or 0, geometry.config.kfac_min_samples, 1))
        decisions = [
            RankDecision(step, *row)
            for row in zip(geometry.layers, choice.current, choice.ranks, choice.reasons, strict=True)
        ]
        geometry.set_ranks(
            F.maps_rule(self._selector.rule.reprojection_mode),
            {decision.layer: decision.new for decision in decisions},
            masked_coordinate=choice.masked_coordinates,
            optimizer=optimizer,
        )
        changes = [decision for decision in decisions if decision.old != decision.new]
        self.decisions.extend(changes)
        unchanged = Counter(decision.reason for decision in decisions if decision.old == decision.new)
        return changes, dict(unchanged), sorted(choice.masked_coordinates)

    # Persistence.

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks apart in a checkpoint."""
        return self._generate_state_key(rule=self.rule, scope=self.scope)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next decision depends on, so that a resumed run decides as the uninterrupted one."""
        return self._selector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._selector.load_state_dict(state_dict)
