"""The effective ranks of all layers as one picture."""

from __future__ import annotations

import torch
from torch import Tensor

from grit_lightning.geometry.rank_space import RankSpaceGeometry


def rank_map(geometry: RankSpaceGeometry, cell: int = 12) -> Tensor:
    """Draw the effective ranks: a row per block of the network, a column per kind of module, brighter for higher k / r.

    Args:
        geometry: Whose ranks.
        cell: Pixels per side of a cell.

    Returns:
        `[3, rows · cell, columns · cell]` in [0, 1]; black where a layer has no such module.
    """
    sites = [
        (site, int(rank)) for group in geometry.groups for site, rank in zip(group.sites, group.ranks, strict=True)
    ]
    rows = {name: row for row, name in enumerate(dict.fromkeys(_block(site.name) for site, _ in sites))}
    columns = {kind: column for column, kind in enumerate(dict.fromkeys(site.kind for site, _ in sites))}
    grid = torch.zeros(3, len(rows), len(columns))
    for site, rank in sites:
        share = rank / site.r
        grid[:, rows[_block(site.name)], columns[site.kind]] = torch.tensor([0.15 + 0.85 * share, 0.75 * share, 0.3])
    return grid.repeat_interleave(cell, 1).repeat_interleave(cell, 2)


def _block(layer: str) -> str:
    """Cut the name after the block's number: `…layers.0.mlp.up_proj` → `…layers.0`; keep it whole if there is none."""
    parts = layer.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else layer
