"""Geometry-aware LoRA (GRIT, arXiv 2601.00231) for PyTorch Lightning.

Nothing heavy is imported before it is asked for: `import grit_lightning` needs no torch, `grit_lightning.GritLitModule` does.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grit_lightning.evaluation.generation import GenerationSettings
    from grit_lightning.geometry.config import GeometryConfig
    from grit_lightning.geometry.rank_space import RankSpaceGeometry
    from grit_lightning.geometry_hooks import GeometryHooks
    from grit_lightning.geometry_steps import GeometrySteps
    from grit_lightning.module import GritLitModule

__version__ = "0.1.0"

__all__ = [
    "GenerationSettings",
    "GeometryConfig",
    "GeometryHooks",
    "GeometrySteps",
    "GritLitModule",
    "RankSpaceGeometry",
    "__version__",
]

_HOMES = {
    "GenerationSettings": "evaluation.generation",
    "GeometryConfig": "geometry.config",
    "GeometryHooks": "geometry_hooks",
    "GeometrySteps": "geometry_steps",
    "GritLitModule": "module",
    "RankSpaceGeometry": "geometry.rank_space",
}
"""Where the exported classes live."""

_SUBPACKAGES = ("callbacks", "configs", "datamodules", "export", "forgetting", "functional", "geometry", "telemetry")
"""What is there as an attribute without an import of its own."""


def _is_about_an_unused_kernel(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward from kernels-community" in record.getMessage()


# PEFT imports bitsandbytes, which says on some processors that an optional kernel, of no use in training, is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: not _is_about_an_unused_kernel(record))


def __getattr__(name: str) -> Any:
    """Import what is asked for the first time (PEP 562)."""
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")  # which makes it an attribute
    if name in _HOMES:
        globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List what can be asked for as well."""
    return sorted({*globals(), *_HOMES, *_SUBPACKAGES})
