"""Which directions a reprojection cuts along: the modes, by name, and the maps that each of them makes.

Notation as in `reprojection`. A rule of maps is asked once per event, for all layers of one rank r, with Σ_a and Σ_g
`[L, r, r]`, the coordinates to keep, bool `[L, r]`, and where Σ_g can be relied on, bool `[L]`.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from grit_lightning.functional.balancing import balanced_maps
from grit_lightning.functional.reprojection import ReprojectionMaps, one_sided_maps, two_sided_maps

MapsRule = Callable[[Tensor, Tensor, Tensor, Tensor], ReprojectionMaps]
"""`(Σ_a, Σ_g, kept, enough_g) → maps`, stacked over layers."""


class ReprojectionMode(str, Enum):
    """Whose directions are kept."""

    ONE_SIDED = "one_sided"
    """A and B on the top eigenvectors of Σ_a (paper, Q-GRIT_uni)."""
    TWO_SIDED = "two_sided"
    """A on the top eigenvectors of Σ_a, B on those of Σ_g (paper, Q-GRIT)."""
    BALANCED = "balanced"
    """A and B on the directions whose loss costs the most, the same in every gauge (beyond the paper)."""

    @classmethod
    def _missing_(cls, value: object) -> None:
        choices = ", ".join(member.value for member in cls)
        raise ValueError(f"mode: expected one of {choices}, got {value!r}")


def maps_rule(
    mode: ReprojectionMode | str, blend: float = 1.0, keep_dropped: bool = True, preserve_volume: bool = True
) -> MapsRule:
    """Return the rule of a mode, ready to be asked for maps.

    Args:
        mode: A `ReprojectionMode` or its value.
        blend: γ in [0, 1]; 1 is a full projection.
        keep_dropped: Rotate A without cutting it, as in `one_sided_maps`; `balanced` always does.
        preserve_volume: For `balanced`, keep the mean scale of A and B; see `balancing_transform`.

    Returns:
        `(Σ_a, Σ_g, kept, enough_g) → maps`.

    Raises:
        ValueError: There is no such mode.

    Example:
        >>> cov = torch.diag(torch.tensor([1.0, 3.0]))[None]
        >>> rule = maps_rule("one_sided", keep_dropped=False)
        >>> rule(cov, cov, torch.tensor([[True, False]]), torch.tensor([True])).a_map[0]
        tensor([[0., 1.],
                [0., 0.]])
    """
    return partial(_MAPS[ReprojectionMode(mode)], cut=_Cut(blend, keep_dropped, preserve_volume))


class _Cut(NamedTuple):
    """How a mode cuts; see `maps_rule`."""

    blend: float
    keep_dropped: bool
    preserve_volume: bool


def _one_sided(a_cov: Tensor, g_cov: Tensor, kept: Tensor, enough_g: Tensor, cut: _Cut) -> ReprojectionMaps:
    return one_sided_maps(a_cov, kept, cut.blend, keep_dropped=cut.keep_dropped)


def _two_sided(a_cov: Tensor, g_cov: Tensor, kept: Tensor, enough_g: Tensor, cut: _Cut) -> ReprojectionMaps:
    return two_sided_maps(a_cov, g_cov, kept, cut.blend, enough_g, keep_dropped=cut.keep_dropped)


def _balanced(a_cov: Tensor, g_cov: Tensor, kept: Tensor, enough_g: Tensor, cut: _Cut) -> ReprojectionMaps:
    """Balance; without any gradient seen there is nothing to balance against, and Σ_a alone decides."""
    balanced = balanced_maps(a_cov, g_cov, kept, cut.blend, cut.preserve_volume)
    fallback = one_sided_maps(a_cov, kept, cut.blend, keep_dropped=True)
    where = enough_g.view(-1, 1, 1)
    return ReprojectionMaps(*(torch.where(where, new, old) for new, old in zip(balanced, fallback, strict=True)))


_MAPS: dict[ReprojectionMode, Callable[..., ReprojectionMaps]] = {
    ReprojectionMode.ONE_SIDED: _one_sided,
    ReprojectionMode.TWO_SIDED: _two_sided,
    ReprojectionMode.BALANCED: _balanced,
}
