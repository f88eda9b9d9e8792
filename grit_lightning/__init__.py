"""Geometry-aware LoRA (GRIT, arXiv 2601.00231) for PyTorch Lightning."""

from grit_lightning.evaluation.generation import GenerationSettings
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.module import GritLitModule

__version__ = "0.1.0"

__all__ = ["GenerationSettings", "GeometryConfig", "GritLitModule", "RankSpaceGeometry", "__version__"]
