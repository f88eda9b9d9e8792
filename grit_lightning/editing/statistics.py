"""Curvature of a trained adapter on given rows: Σ_a, Σ_g and E[g aᵀ] of every layer, as training would have collected them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from grit_lightning.backbones.inputs import accepted_arguments
from grit_lightning.batches import label_token_count, learnt_labels, model_inputs
from grit_lightning.editing.rows import Rows, batches_of, predicted_tokens
from grit_lightning.errors import DivergedError, InvalidValueError
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.rank_group import RankGroup
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.geometry.sites import LoraSite

Progress = Callable[[str, int, int], None]
"""Is told what is being done, how much of it has been done, and how much there is."""


@dataclass(frozen=True)
class GroupStatistics:
    """Statistics of the L layers that share a rank r.

    Attributes:
        names: Names of the layers in the model.
        a_cov: Σ_a `[L, r, r]`, mean over all tokens that were read.
        g_cov: Σ_g `[L, r, r]`, of gradients of the sum of token losses, mean over the same tokens.
        cross: E[g aᵀ] = Bᵀ∇B `[L, r, r]`, mean over the same tokens, for `functional.first_order_change`.
    """

    names: tuple[str, ...]
    a_cov: Tensor
    g_cov: Tensor
    cross: Tensor


@dataclass(frozen=True)
class AdapterStatistics:
    """Statistics of all layers of an adapter.

    Attributes:
        groups: By rank.
        tokens: Tokens that were read, padding left out.
        predicted: Tokens that were predicted.
    """

    groups: tuple[GroupStatistics, ...]
    tokens: float
    predicted: float

    @property
    def per_predicted(self) -> float:
        """Tokens read for each that was predicted: what turns a cost per token read into nats per token predicted."""
        return self.tokens / max(self.predicted, 1)

    @classmethod
    def mixed(cls, parts: Sequence[AdapterStatistics], weights: Sequence[float]) -> AdapterStatistics:
        """Return the weighted mean over several sources, each of them for one of its predicted tokens.

        So a source counts by its weight, as in a mean of losses, however few of the tokens that are read are predicted in it.
        The factors of a mixture are taken for the mixture of the factors.

        Args:
            parts: Statistics of the same adapter.
            weights: Positive weights; only their ratios matter.
        """
        shares = [weight / sum(weights) for weight in weights]
        per_label = [share * part.per_predicted for share, part in zip(shares, parts, strict=True)]
        groups = tuple(
            GroupStatistics(
                same[0].names,
                _weighted_sum([group.a_cov for group in same], shares),
                _weighted_sum([group.g_cov for group in same], per_label),
                _weighted_sum([group.cross for group in same], per_label),
            )
            for same in zip(*(part.groups for part in parts), strict=True)
        )
        predicted = sum(part.predicted for part in parts)
        return cls(groups, predicted, predicted)


def measure_statistics(
    model: PeftModel,
    rows: Rows,
    batch_size: int = 4,
    progress: Progress | None = None,
    name: str = "statistics",
) -> AdapterStatistics:
    """Run the model forward and backward over rows, and keep what its adapter's rank spaces see.

    The sums are streamed: memory is that of a training step without activation checkpointing, which evaluation mode switches
    off. Dropout is off too. The model's weights, gradients, modes and `requires_grad` are as they were afterwards.

    Args:
        model: A PEFT model with one active LoRA adapter.
        rows: See `editing.rows`; those that predict nothing are left out.
        batch_size: Rows at a time; changes the rounding only.
        progress: Is told how many rows have been read.
        name: What `progress` calls this.

    Returns:
        The statistics, float32 on the adapter's device.

    Raises:
        ValueError: If the adapter is no plain LoRA, or rows pass some of its layers by.
        FloatingPointError: If a row's loss or gradient is not finite.
    """
    geometry = RankSpaceGeometry(model, GeometryConfig())
    try:
        with _listening(model, geometry):
            return _stream(model, geometry, rows, batch_size, progress, name)
    finally:
        geometry.detach()


def _stream(
    model: PeftModel,
    geometry: RankSpaceGeometry,
    rows: Rows,
    batch_size: int,
    progress: Progress | None,
    name: str,
) -> AdapterStatistics:
    device = geometry.groups[0].factors("a")[0].device
    geometry.to(device)
    accepted = accepted_arguments(model)
    cross = [torch.zeros_like(group.a_cov) for group in geometry.groups]
    tokens = predicted = read = 0
    telling = [row for row in rows if predicted_tokens(row)]
    for chosen, batch in batches_of(telling, batch_size, device):
        labels = int(label_token_count(learnt_labels(batch)))
        geometry.start_micro_batch(batch["attention_mask"], labels)
        loss = model(**model_inputs(batch, accepted, trim=True), use_cache=False).loss
        loss.backward()
        if not bool(loss.isfinite()):
            raise _diverged(name, "losses")
        geometry.finish_micro_batch()
        for total, group in zip(cross, geometry.groups, strict=True):
            total += labels * torch.stack([_cross(site) for site in group.sites])
        model.zero_grad(set_to_none=True)
        tokens, predicted = tokens + int(batch["attention_mask"].sum()), predicted + labels
        read += len(chosen)
        if progress is not None:
            progress(name, read, len(telling))
    geometry.finish_window()
    geometry.reduce()
    _require_heard(geometry, name)
    if geometry.counters["rejected"]:
        raise _diverged(name, "gradients")
    groups = tuple(_statistics(*pair, tokens) for pair in zip(geometry.groups, cross, strict=True))
    return AdapterStatistics(groups, tokens, predicted)


def _weighted_sum(matrices: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    return torch.stack([factor * matrix for factor, matrix in zip(factors, matrices, strict=True)]).sum(dim=0)


def _require_heard(geometry: RankSpaceGeometry, name: str) -> None:
    """Check that every layer has sent statistics.

    Raises:
        ValueError: If one has not.
    """
    silent = [
        site.name
        for group in geometry.groups
        for site, count in zip(group.sites, group.counts.capture_counts.tolist(), strict=True)
        if count == 0
    ]
    if silent:
        raise InvalidValueError(
            f"{name}: expected layers that all take part in the model's forward pass through lora_A, got {len(silent)} of "
            f"{len(geometry.layers)} that do not, first {silent[0]}. Their "
            "update cannot be edited: leave them out of the adapter."
        )


def _statistics(group: RankGroup, cross: Tensor, tokens: int) -> GroupStatistics:
    names = tuple(site.name for site in group.sites)
    return GroupStatistics(names, group.a_cov.clone(), group.g_cov.clone(), cross / max(tokens, 1))


def _diverged(name: str, what: str) -> DivergedError:
    return DivergedError(f"{name}: expected finite {what}, got others. The adapter has diverged: take an earlier one.")


def _cross(site: LoraSite) -> Tensor:
    """Bᵀ∇B `[r, r]` of the backward pass that has just run; zero for a layer that took no part in it."""
    weight = site.up.weight
    if weight.grad is None:
        return torch.zeros(site.r, site.r, dtype=torch.float32, device=weight.device)
    return weight.detach().float().mT @ weight.grad.float()


@contextmanager
def _listening(model: PeftModel, geometry: RankSpaceGeometry) -> Iterator[None]:
    """Let gradients flow to the factors alone, without dropout; put everything back."""
    modes = {module: module.training for module in model.modules()}
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    factors = {id(factor) for group in geometry.groups for side in ("a", "b") for factor in group.factors(side)}
    try:
        model.eval()
        for parameter in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in factors)
        with torch.enable_grad():
            yield
    finally:
        for parameter, (requires_grad, grad) in before.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, training in modes.items():
            module.training = training
