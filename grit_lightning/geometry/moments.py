"""Carries an optimizer's moments of the adapter through the linear maps of a reprojection."""

from __future__ import annotations

import warnings
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_lightning import functional as F
from grit_lightning.geometry.rank_group import RankGroup, ReadTensor, UpdatePair

FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer", "mu"})
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})


@runtime_checkable
class ChangesCoordinates(Protocol):
    """An optimizer that carries its own state through a change of coordinates, as those of `optimizers` do."""

    def change_coordinates(self, group: RankGroup, maps: F.ReprojectionMaps) -> None:
        """Carry the state of the factors of all layers of `group` through `maps` `[L, r, r]`, in place."""


def carry_optimizer_state(optimizer: Optimizer, group: RankGroup, maps: F.ReprojectionMaps) -> None:
    """Carry the moments of A and B of all layers of `group` along, by the optimizer's own rule if it has one.

    Args:
        optimizer: Any torch optimizer over the adapter's parameters.
        group: Layers that were reprojected.
        maps: Their maps `[L, r, r]`.
    """
    if isinstance(optimizer, ChangesCoordinates):
        optimizer.change_coordinates(group, maps)
    else:
        carry_moments(optimizer, group, maps)


@torch.no_grad()
def carry_moments(optimizer: Optimizer, group: RankGroup, maps: F.ReprojectionMaps) -> None:
    """Carry moments that are kept in the coordinates of the factors, in place, as `functional.carry` derives.

    First moments are carried exactly (they are linear in the gradients), second moments by the squared maps, which
    ignores covariances between gradient entries. State of the parameter's shape that is neither is set to zero, with a
    warning, since keeping it would apply old coordinates to new ones.

    Args:
        optimizer: Any torch optimizer over the adapter's parameters.
        group: Layers that were reprojected.
        maps: Their maps `[L, r, r]`.
    """
    names = {
        name
        for factor in (*group.factors("a"), *group.factors("b"))
        for name, value in optimizer.state.get(factor, {}).items()
        if torch.is_tensor(value) and value.shape == factor.shape
    }
    unknown = sorted(names - FIRST_MOMENTS - SECOND_MOMENTS)
    if unknown:
        warnings.warn(
            f"{type(optimizer).__name__} keeps state {unknown} whose behaviour under a change of basis is unknown; it "
            "restarts from zero at every reprojection.",
            stacklevel=2,
        )
    for name in sorted(names):
        group.update_pairs(_reader(optimizer, name), _carrier(name, group, maps))


def _reader(optimizer: Optimizer, name: str) -> ReadTensor:
    def read(factor: Tensor) -> Tensor | None:
        value = optimizer.state.get(factor, {}).get(name)
        return value if torch.is_tensor(value) and value.shape == factor.shape else None

    return read


def _carrier(name: str, group: RankGroup, maps: F.ReprojectionMaps) -> UpdatePair:
    kept, preconditioned = group.kept.float(), group.last_step_preconditioned

    def update(of_a: Tensor | None, of_b: Tensor | None, layers: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if name not in FIRST_MOMENTS | SECOND_MOMENTS:
            return (None if of_a is None else torch.zeros_like(of_a), None if of_b is None else torch.zeros_like(of_b))
        carry = F.carry_first_moment if name in FIRST_MOMENTS else F.carry_second_moment
        here = F.ReprojectionMaps(maps.a_map[layers], maps.b_map[layers])
        new_a, new_b = carry(of_a, of_b, here, preconditioned=preconditioned)
        return (
            None if new_a is None else new_a * kept[layers].unsqueeze(-1),
            None if new_b is None else new_b * kept[layers].unsqueeze(-2),
        )

    return update
