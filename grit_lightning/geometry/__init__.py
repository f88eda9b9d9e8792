"""The rank-space geometry: what is remembered of every adapted layer between steps, and everything that writes it."""

from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.rank_space import LayerView, RankSpaceGeometry

__all__ = ["GeometryConfig", "LayerView", "RankSpaceGeometry"]
