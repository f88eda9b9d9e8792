"""The picture of the effective ranks.

Proven here: a row per block and a column per kind of module, black where there is none; a cell is brighter for a higher
share of its rank; cells are squares of the size asked for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grit_lightning.telemetry.rank_map import rank_map


@pytest.fixture
def geometry() -> Any:
    """Two blocks, of which only the first has an `up`."""
    names = ["layers.0.q", "layers.0.up", "layers.1.q"]
    sites = [SimpleNamespace(name=f"base_model.model.{name}", kind=name.rpartition(".")[2], r=4) for name in names]
    return SimpleNamespace(groups=[SimpleNamespace(sites=sites, ranks=torch.tensor([4, 4, 4]))])


def test_a_row_per_block_and_a_column_per_kind_of_module(geometry: Any) -> None:
    picture = rank_map(geometry, cell=1)
    assert picture.shape == (3, 2, 2)
    assert (picture > 0).any(0).tolist() == [[True, True], [True, False]]


def test_a_lower_rank_is_darker_and_changes_no_other_cell(geometry: Any) -> None:
    full = rank_map(geometry, cell=1)
    geometry.groups[0].ranks[2] = 1
    lowered = rank_map(geometry, cell=1)
    assert (full != lowered).any(0).tolist() == [[False, False], [True, False]]
    assert bool((lowered <= full).all())


def test_cells_are_squares_of_the_size_asked_for(geometry: Any) -> None:
    picture = rank_map(geometry, cell=3)
    assert picture.shape == (3, 6, 6)
    assert torch.equal(picture[:, ::3, ::3], rank_map(geometry, cell=1))
    assert torch.equal(picture[:, 2::3, 1::3], rank_map(geometry, cell=1))
