"""BERTScore row by row: its encoder, and torchmetrics' scores with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics.functional.text import bert_score
from transformers import AutoModel, AutoTokenizer

from grit_lightning.errors import FileAccessError, InvalidValueError

MAX_LENGTH = 512
"""Tokens of a text that are compared, as in bert-score; fewer if the encoder takes fewer."""


class BertScorer:
    """BERTScore precision, recall and F1 of pairs of texts.

    Args:
        encoder: Hub id, or a folder with config.json, *.safetensors and tokenizer files.
        layer: Hidden layer to compare, from 1.
        device: Where the encoder runs.

    Raises:
        OSError: If the encoder cannot be read.
        ValueError: If it has fewer layers.
    """

    def __init__(self, encoder: str, layer: int, device: torch.device) -> None:
        """Load the encoder now, not after hours of generating."""
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
            self._model = AutoModel.from_pretrained(encoder, use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            folder = os.path.basename(encoder.rstrip("/"))
            raise FileAccessError(
                f"model.generation.bertscore_encoder: expected a folder, or a hub id that can be fetched, got {encoder!r}: "
                f"{str(error).strip().splitlines()[0]} Where there is a network, run\n"
                f"    hf download {encoder} --local-dir {folder}\n"
                "then copy the folder here and set model.generation.bertscore_encoder to it, or set it to null to leave "
                "BERTScore out."
            ) from error
        layers = self._model.config.num_hidden_layers
        if layer > layers:
            raise InvalidValueError(
                f"model.generation.bertscore_layer: expected at most {layers}, the layers of {encoder!r}, got {layer}."
            )
        self._model.requires_grad_(False).eval()
        self._layer = layer
        self._device = device
        self._max_length = min(MAX_LENGTH, self._tokenizer.model_max_length)

    def __call__(self, outputs: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
        """Score rows.

        Args:
            outputs: B texts.
            references: Their references.

        Returns:
            Each row's precision, recall and f1; 0 for an empty text.
        """
        return [self._pair(output, reference) for output, reference in zip(outputs, references, strict=True)]

    def _pair(self, output: str, reference: str) -> dict[str, float]:
        # One pair at a time: torchmetrics (1.9) sorts outputs and references by length and restores their order with the
        # wrong permutation, so that of three or more texts some are compared with another row's reference.
        with isolate_rng():  # its data loader draws a seed, which it does not need
            scores: Any = bert_score(
                [output],
                [reference],
                model=self._model,
                user_tokenizer=self._tokenizer,
                num_layers=self._layer,
                max_length=self._max_length,
                truncation=True,
                device=self._device,
            )
        return {name: float(torch.nan_to_num(scores[name])) for name in ("precision", "recall", "f1")}
