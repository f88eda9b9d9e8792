"""Frozen language models: where they come from, how they are loaded, which adapter they get."""

from grit_lightning.backbones.loading import attach_adapter, empty_backbone, load_backbone, load_tokenizer

__all__ = ["attach_adapter", "empty_backbone", "load_backbone", "load_tokenizer"]
