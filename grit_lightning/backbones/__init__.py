"""Frozen language models: where they come from, how they are loaded, which adapter they get."""

from grit_lightning.backbones.adapters import attach_adapter
from grit_lightning.backbones.loading import load_backbone, load_tokenizer
from grit_lightning.backbones.shapes import empty_backbone

__all__ = ["attach_adapter", "empty_backbone", "load_backbone", "load_tokenizer"]
