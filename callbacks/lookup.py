"""What callbacks that run the model on text of their own take from module and data: the PEFT model, and a tokenizer."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from grit_lightning.backbones.loading import load_tokenizer


def tokenizer_for(
    owner: str, given: str | None, trainer: pl.Trainer, pl_module: pl.LightningModule
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a callback names, or else the data module's, or else the backbone's.

    Args:
        owner: Class of the callback, for the message.
        given: Hub id or folder, or None.
        trainer: Has the data module.
        pl_module: Knows its backbone.

    Raises:
        MisconfigurationException: If there is none.
    """
    if given is not None:
        return load_tokenizer(given)
    of_data = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    if isinstance(of_data, PreTrainedTokenizerBase):
        return of_data
    backbone = getattr(pl_module, "backbone_options", {}).get("source")
    if not isinstance(backbone, str):
        raise MisconfigurationException(
            f"{owner}.tokenizer: expected a tokenizer here or from the data module or backbone, got none. Set it to a hub id "
            "or folder."
        )
    return load_tokenizer(backbone)


def peft_model_of(owner: str, pl_module: pl.LightningModule) -> PeftModel:
    """Return the module's PEFT model.

    Args:
        owner: Class of the callback, for the message.
        pl_module: The module.

    Raises:
        MisconfigurationException: If it has none.
    """
    model = getattr(pl_module, "model", None)
    if not isinstance(model, PeftModel):
        raise MisconfigurationException(
            f"{owner}: expected {type(pl_module).__name__}.model to be a PEFT model, whose adapter can be told from its "
            f"backbone, got {type(model).__name__}. Use a GritLitModule, or remove the callback."
        )
    return model
