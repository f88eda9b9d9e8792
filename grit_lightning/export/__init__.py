"""From a trained module or checkpoint to files that plain PEFT and transformers load."""

from grit_lightning.export.adapter import export_adapter

__all__ = ["export_adapter"]
