"""Carries an optimizer's moments of the adapter through the linear maps of a reprojection."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_lightning import functional as F
from grit_lightning.geometry.rank_group import RankGroup

FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer", "mu"})
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})


@torch.no_grad()
def carry_optimizer_state(optimizer: Optimizer, group: RankGroup, maps: F.ReprojectionMaps) -> None:
    """Transform the moments of A and B of all layers of `group` in place, as `functional.carry` derives.

    First moments are carried exactly (they are linear in the gradients), second moments by the squared maps, which
    ignores covariances between gradient entries. An average of raw gradients moves like a gradient (A's by b_mapᵀ from the
    left, B's by a_mapᵀ from the right); an average of preconditioned ones moves like the factors themselves, because
    (Σ_g')⁻¹ b_mapᵀ ∇A = a_map Σ_g⁻¹ ∇A for b_map = a_map⁻¹. State of the parameter's shape that is neither is set to zero, with
    a warning, since keeping it would apply old coordinates to new ones.

    Args:
        optimizer: Any torch optimizer over the adapter's parameters.
        group: Layers that were reprojected.
        maps: Their maps `[L, r, r]`.
    """
    _move_bases(optimizer, group, maps)
    kept = group.kept.float()
    names = {
        name
        for side in ("a", "b")
        for factor in group.factors(side)
        for name, value in optimizer.state.get(factor, {}).items()
        if torch.is_tensor(value) and value.shape == factor.shape and "basis" not in optimizer.state[factor]
    }
    unknown = sorted(names - FIRST_MOMENTS - SECOND_MOMENTS)
    if unknown:
        warnings.warn(
            f"{type(optimizer).__name__} keeps state {unknown} whose behaviour under a change of basis is unknown; it "
            "restarts from zero at every reprojection.",
            stacklevel=2,
        )
    for name in sorted(names):
        for side in ("a", "b"):
            group.apply(side, _reader(optimizer, name), _carrier(name, side, maps, kept, group.natural))


def _move_bases(optimizer: Optimizer, group: RankGroup, maps: F.ReprojectionMaps) -> None:
    """Moments kept in a basis of their own stay as they are; the basis is what moves."""
    left, right = F.gradient_maps(maps)
    for side, change in (("a", left), ("b", right.mT)):
        for index, factor in enumerate(group.factors(side)):
            state = optimizer.state.get(factor, {})
            if "basis" in state:
                state["basis"], state["version"] = change[index] @ state["basis"], -1


def _reader(optimizer: Optimizer, name: str) -> Callable[[Tensor], Tensor | None]:
    def read(factor: Tensor) -> Tensor | None:
        value = optimizer.state.get(factor, {}).get(name)
        return value if torch.is_tensor(value) and value.shape == factor.shape else None

    return read


def _carrier(
    name: str, side: str, maps: F.ReprojectionMaps, kept: Tensor, natural: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    left, right = maps if natural else F.gradient_maps(maps)
    if name in SECOND_MOMENTS:
        left, right = left.square(), right.square()

    def update(stack: Tensor, layers: Tensor) -> Tensor:
        if name not in FIRST_MOMENTS | SECOND_MOMENTS:
            return torch.zeros_like(stack)
        if side == "a":
            return left[layers] @ stack.float() * kept[layers].unsqueeze(-1)
        return stack.float() @ right[layers] * kept[layers].unsqueeze(-2)

    return update
