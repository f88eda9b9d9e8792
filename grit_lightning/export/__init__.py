"""From a trained module, checkpoint or adapter to files that plain PEFT and transformers load."""

from grit_lightning.export.adapter import export_adapter
from grit_lightning.export.retention import RetentionResult, retain_adapter

__all__ = ["RetentionResult", "export_adapter", "retain_adapter"]
