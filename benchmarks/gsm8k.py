"""GSM8K from local files, for the benchmarks: questions that fit a length, batches with labels on the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Example = dict[str, list[int]]


def examples(path: Path, tokenizer: Any, longest: int, count: int) -> list[Example]:
    """The first `count` questions whose prompt and answer fit `longest` tokens.

    Args:
        path: train.jsonl or test.jsonl with columns question and answer.
        tokenizer: The backbone's.
        longest: Tokens of prompt and answer together.
        count: Questions wanted.

    Raises:
        ValueError: If the file has fewer.
    """
    rows: list[Example] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        answer = [*tokenizer(" " + row["answer"]).input_ids, tokenizer.eos_token_id]
        if len(prompt) + len(answer) <= longest:
            rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        if len(rows) == count:
            return rows
    raise ValueError(f"{path} has only {len(rows)} questions of at most {longest} tokens, {count} are wanted.")


def collate(pad: int, rows: list[Example]) -> dict[str, Tensor]:
    """Right-pad to the longest row: input_ids, labels, attention_mask `[B, T]`."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(width) < lengths[:, None]).long()
    return {"input_ids": padded("input_ids", pad), "labels": padded("labels", -100), "attention_mask": mask}
