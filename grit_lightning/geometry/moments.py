"""Carries an optimizer's moments of the adapter through the linear maps of a reprojection."""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from grit_lightning import functional as F
from grit_lightning.geometry.optimizer_state import Kind, kept_elsewhere, parts_of
from grit_lightning.geometry.rank_group import RankGroup, UpdatePair


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
    """Carry what is kept in the coordinates of the factors, in place, as `functional.carry` derives.

    First moments are carried exactly (they are linear in the gradients), second moments by the squared maps, which
    ignores covariances between gradient entries, and averages of weights like the weights. An optimizer that keeps anything
    else of a factor begins anew with it, with a warning: a part of its state would not fit the others.

    Args:
        optimizer: Any torch optimizer over the adapter's parameters.
        group: Layers that were reprojected.
        maps: Their maps `[L, r, r]`.
    """
    factors = [*group.factors("a"), *group.factors("b")]
    found = [parts_of(optimizer, factor) for factor in factors]
    elsewhere = kept_elsewhere(optimizer)
    if unknown := sorted({*(name for _, names in found for name in names), *map(str, elsewhere)}):
        _begin_anew(optimizer, group, maps)
        for key in elsewhere:
            del optimizer.state[key]
        rank_zero_warn(
            f"{type(optimizer).__name__} keeps state {unknown} whose behaviour under a change of basis is unknown; it begins "
            "anew, as before its first step, with every layer that is reprojected."
        )
        return
    tensors: dict[tuple[str, Kind], dict[Tensor, Tensor]] = defaultdict(dict)
    for factor, (parts, _) in zip(factors, found, strict=True):
        for part in parts:
            tensors[part.name, part.kind][factor] = part.value
    for (_, kind), values in sorted(tensors.items(), key=lambda item: item[0][0]):
        group.update_pairs(values.get, _carrier(kind, group, maps))
    for parts, _ in found:
        for part in parts:
            part.keep()


def _begin_anew(optimizer: Optimizer, group: RankGroup, maps: F.ReprojectionMaps) -> None:
    """Forget the state of the factors whose coordinates have changed; optimizers make it where there is none."""
    identity = torch.eye(group.r, device=maps.a_map.device)
    changed = ((maps.a_map != identity) | (maps.b_map != identity)).flatten(1).any(1).tolist()
    for side in ("a", "b"):
        for factor, has in zip(group.factors(side), changed, strict=True):
            if has:
                optimizer.state.pop(factor, None)


def _carrier(kind: Kind, group: RankGroup, maps: F.ReprojectionMaps) -> UpdatePair:
    weights, kept = kind is Kind.WEIGHTS, group.kept.float()
    carry = F.carry_second_moment if kind is Kind.SECOND_MOMENT else F.carry_first_moment

    def update(of_a: Tensor | None, of_b: Tensor | None, layers: Tensor) -> tuple[Tensor | None, Tensor | None]:
        here = F.ReprojectionMaps(maps.a_map[layers], maps.b_map[layers])
        new_a, new_b = carry(of_a, of_b, here, preconditioned=weights or group.last_step_preconditioned)
        return (  # A keeps its rows beyond the rank, so an average of it does
            new_a if new_a is None or weights else new_a * kept[layers].unsqueeze(-1),
            None if new_b is None else new_b * kept[layers].unsqueeze(-2),
        )

    return update
