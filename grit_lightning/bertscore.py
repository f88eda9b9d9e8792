"""The encoder of BERTScore, and torchmetrics' scores with it, row by row."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.text import bert_score
from transformers import AutoModel, AutoTokenizer

MAX_LENGTH = 512
"""Tokens of a text that are looked at, as in bert-score; less where the encoder takes less."""


class BertScorer:
    """BERTScore precision, recall and F1 of pairs of texts.

    Args:
        encoder: Hub id, or a folder with config.json, *.safetensors and tokenizer files.
        layer: Hidden layer to compare, from 1.

    Raises:
        OSError: The encoder cannot be had.
        ValueError: It has fewer layers.
    """

    def __init__(self, encoder: str, layer: int) -> None:
        """Load the encoder: now, and not after hours of generating."""
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
            self._model = AutoModel.from_pretrained(encoder, use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            folder = os.path.basename(encoder.rstrip("/"))
            raise OSError(
                f"BERTScore's encoder {encoder!r} is neither a folder here nor could it be had from the hub: "
                f"{str(error).strip().splitlines()[0]} Where there is a network, run\n"
                f"    hf download {encoder} --local-dir {folder}\n"
                "copy the folder here and set model.generation.bertscore_encoder to it, or set it to null to leave "
                "BERTScore out."
            ) from error
        layers = self._model.config.num_hidden_layers
        if layer > layers:
            raise ValueError(
                f"bertscore_layer={layer}, but BERTScore's encoder {encoder!r} has {layers} layers. Set "
                f"model.generation.bertscore_layer to at most {layers}."
            )
        self._model.requires_grad_(False).eval()
        self._layer = layer
        self._max_length = min(MAX_LENGTH, self._tokenizer.model_max_length)

    def __call__(
        self, outputs: Sequence[str], references: Sequence[str], device: torch.device
    ) -> list[dict[str, float]]:
        """Scores rows.

        Args:
            outputs: B texts.
            references: Their references.
            device: Where the encoder runs.

        Returns:
            precision, recall and f1 of every row; 0 for an empty text.
        """
        if not outputs:
            return []
        scores: Any = bert_score(
            list(outputs),
            list(references),
            model=self._model,
            user_tokenizer=self._tokenize,
            num_layers=self._layer,
            device=device,
        )
        columns = {name: torch.nan_to_num(scores[name].reshape(-1)).tolist() for name in ("precision", "recall", "f1")}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _tokenize(self, texts: list[str], *_: Any) -> dict[str, Tensor]:
        encoded: Any = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
