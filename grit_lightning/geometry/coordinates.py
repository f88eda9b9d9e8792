"""Changes of coordinates in rank space: weights, statistics and optimizer moments go through the same linear maps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_lightning import functional as F
from grit_lightning.errors import InvalidValueError
from grit_lightning.geometry.moments import carry_optimizer_state
from grit_lightning.geometry.rank_group import RankGroup


class CoordinateChange:
    """One change of coordinates of the layers of a group, to new effective ranks.

    Args:
        group: The layers.
        ranks: New effective ranks by layer name; layers not named keep theirs.
        masked_coordinate: By layer name, a coordinate to zero in B this once.
        enough: `[L]` bool, layers with enough samples; others stay as they are.
        only_where_needed: Leave layers alone whose rank does not change and that lose no coordinate.

    Raises:
        ValueError: If a rank is not in 1 … r.
    """

    def __init__(
        self,
        group: RankGroup,
        ranks: Mapping[str, int],
        masked_coordinate: Mapping[str, int],
        enough: Tensor,
        only_where_needed: bool,
    ) -> None:
        """Work out which coordinates stay, and which layers fall and rise."""
        self._group, self._enough, self._only_where_needed = group, enough, only_where_needed
        self._wanted = torch.tensor(
            [ranks.get(site.name, int(rank)) for site, rank in zip(group.sites, group.ranks, strict=True)]
        )
        if bool(((self._wanted < 1) | (self._wanted > group.r)).any()):
            raise InvalidValueError(
                f"ranks: expected effective ranks in 1 … r = {group.r}, got {sorted(set(self._wanted.tolist()))}."
            )
        self._kept = F.rank_mask(self._wanted, group.r)
        masked = torch.tensor([site.name in masked_coordinate for site in group.sites])
        for index in masked.nonzero().flatten().tolist():
            self._kept[index, masked_coordinate[group.sites[index].name]] = False
        self._falling = (group.ranks > self._wanted) | masked
        self._rising = (group.ranks < self._wanted) & ~masked

    def apply(self, rule: F.MapsRule, blend: float, optimizer: Optimizer | None) -> F.ReprojectionMaps:
        """Transform weights, statistics and moments; set the ranks if the projection is full (blend 1). Return the maps."""
        group, maps = self._group, self._maps(rule)
        if blend == 1.0:
            group.ranks = torch.where(self._enough.cpu(), self._wanted, group.ranks)
        kept = group.kept.unsqueeze(-2)  # exactly zero beyond the rank, where products of maps leave rounding behind

        def update(a: Tensor | None, b: Tensor | None, layers: Tensor) -> tuple[Tensor, Tensor]:
            assert a is not None
            assert b is not None  # every factor has data
            return maps.a_map[layers] @ a.float(), b.float() @ maps.b_map[layers] * kept[layers]

        group.update_pairs(lambda factor: factor.data, update)
        group.statistics.change_coordinates(maps)
        if optimizer is not None:
            carry_optimizer_state(optimizer, group, maps)
        return maps

    def _maps(self, rule: F.MapsRule) -> F.ReprojectionMaps:
        group, enough = self._group, self._enough
        seen_g = group.statistics.total.g.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
        moving = enough & self._falling.to(group.device) if self._only_where_needed else enough
        maps = _where(moving, rule(group.a_cov, group.judged_g_cov, self._kept.to(group.device), enough & seen_g))
        if self._only_where_needed and bool(self._rising.any()):
            regrowth = F.regrowth(group.a_cov, group.statistics.gradient_gram, group.ranks.to(group.device))
            maps = _where(enough & self._rising.to(group.device), regrowth.maps, maps)
        return maps


def _where(choose: Tensor, maps: F.ReprojectionMaps, other: F.ReprojectionMaps | None = None) -> F.ReprojectionMaps:
    """Take `maps` for the layers that `choose` `[L]` marks, `other` (by default the identity) elsewhere."""
    identity = torch.eye(maps.a_map.shape[-1], dtype=maps.a_map.dtype, device=maps.a_map.device)
    rest = (identity, identity) if other is None else other
    where = choose.view(-1, 1, 1)
    return F.ReprojectionMaps(*(torch.where(where, new, old) for new, old in zip(maps, rest, strict=True)))
