"""What has to be right before a run is worth starting, found from settings and shapes before a weight or a row is read.

Loading takes minutes, and Lightning loads data before models, so that a typo in the adapter would be the last to be found.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grit_lightning.backbones.adapter_methods import require_generation
from grit_lightning.backbones.adapters import attach_adapter, lacks_weights
from grit_lightning.backbones.inputs import require_context
from grit_lightning.backbones.shapes import empty_backbone
from grit_lightning.errors import InvalidValueError
from grit_lightning.evaluation.datamodule_protocols import HasMaxLength, HasTokenizer, tasks_of
from grit_lightning.geometry.sites import find_lora_sites, require_lora


def require_adapter_fits(
    backbone_options: Mapping[str, Any], adapter: PeftConfig, *, geometry: bool, generation: bool
) -> PeftModel | PreTrainedModel:
    """Check that a backbone can be loaded and trained with an adapter, without loading it.

    A few methods compute with the weights while they are attached (BOFT, SHiRA …). What is particular to those is checked
    when the model is built.

    Args:
        backbone_options: Arguments of `load_backbone`.
        adapter: The adapter's configuration.
        geometry: Whether a geometry is to follow the adapter.
        generation: Whether answers are to be generated.

    Returns:
        The model that would be trained, on the meta device.

    Raises:
        ValueError: If the backbone is no causal language model or cannot be loaded, or the adapter does not fit it.
    """
    if geometry:
        require_lora(adapter)
    if generation:
        require_generation(adapter)
    with isolate_rng(include_cuda=False), warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # what is worth a warning gives it again when the model is built
        backbone = empty_backbone(**backbone_options)
        try:
            model = attach_adapter(backbone, adapter)
        except RuntimeError as error:
            if not lacks_weights(error):
                raise
            return backbone
        if geometry:
            find_lora_sites(model)
    return model


def require_data_fits(model: PeftModel | PreTrainedModel, datamodule: object) -> None:
    """Check that a model can read what a data module gives: its longest row, and its tokens.

    Args:
        model: The model; its weights are not looked at.
        datamodule: Any object; see `HasMaxLength` and `HasTokenizer`.

    Raises:
        ValueError: If a row could be longer than the model's context, or a token is not in its vocabulary.
    """
    if isinstance(datamodule, HasMaxLength):
        length = datamodule.max_length or 0
        require_context(model, length, "the data module's longest sequence", "data.max_length")
    task = next(iter(tasks_of(datamodule).values()))  # those of a mixture share a tokenizer
    if isinstance(task, HasTokenizer) and isinstance(task.tokenizer, PreTrainedTokenizerBase):
        _require_vocabulary(model.config.get_text_config().vocab_size, task.tokenizer)


def _require_vocabulary(size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens without an embedding, but for added ones that no text comes to (Gemma 3 has one that stands for images)."""
    if len(tokenizer) <= size:
        return
    used = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    template = str(tokenizer.chat_template or "")
    beyond = [token for token, number in tokenizer.get_added_vocab().items() if number >= size]
    if tokenizer.vocab_size > size or any(token in used or token in template for token in beyond):
        raise InvalidValueError(
            f"data.tokenizer: expected one whose tokens all have an embedding in the backbone, which has {size}, got one with "
            f"{len(tokenizer)} tokens. Set it to the backbone's own, or resize the backbone's embeddings and save it first."
        )
