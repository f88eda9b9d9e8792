"""An adapter on a tiny Llama with something to forget: trained by a plain loop on one kind of rows, the backbone on another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

Rows = list[dict[str, list[int]]]


def rows(count: int, seed: int, low: int, high: int, length: int = 12, prompt: int = 3) -> Rows:
    """Rows that count up or down from a random start within [low, high): something a model can learn."""
    generator = torch.Generator().manual_seed(seed)
    made: Rows = []
    for index in range(count):
        start, step = torch.randint(0, high - low, (2,), generator=generator).tolist()
        extra = index % 3
        ids = [low + (start + (1 + step % 3) * i) % (high - low) for i in range(length + extra)]
        ids[:2] = (low + torch.randint(0, high - low, (2,), generator=generator)).tolist()  # no two rows are the same
        made.append({"input_ids": ids, "learnt": [prompt, length + extra]})
    return made


def train(model: Any, data: Rows, steps: int, lr: float) -> None:
    """A plain loop, without anything of this package."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for step in range(steps):
        chosen = [data[(4 * step + i) % len(data)] for i in range(4)]
        length = min(len(row["input_ids"]) for row in chosen)
        ids = torch.tensor([row["input_ids"][:length] for row in chosen])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def knowing_backbone(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_dir: Path) -> Path:
    """A folder with a tiny Llama that has learnt general rows."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(tiny_backbone_dir)
    train(model, rows(64, 1, 10, 40), 60, 1e-2)
    folder = tmp_path_factory.mktemp("knowing_backbone")
    model.save_pretrained(folder)
    for file in Path(tiny_backbone_dir).glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory, knowing_backbone: Path) -> Path:
    """A PEFT folder with an adapter that has learnt the task, and forgotten some of what the backbone knew."""
    torch.manual_seed(0)
    backbone = LlamaForCausalLM.from_pretrained(knowing_backbone)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(backbone, config)
    train(model, rows(48, 2, 30, 80), 40, 2e-2)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def adapted(knowing_backbone: Path, adapter_dir: Path) -> PeftModel:
    """The trained adapter in its model."""
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(knowing_backbone), str(adapter_dir))


@pytest.fixture(scope="session")
def task_rows() -> Callable[[int, int], Rows]:
    """A factory of rows of the task, from a count and a seed."""
    return lambda count, seed: rows(count, seed, 30, 80)


@pytest.fixture(scope="session")
def general_rows() -> Callable[[int, int], Rows]:
    """A factory of rows of what the backbone knew, from a count and a seed."""
    return lambda count, seed: rows(count, seed, 10, 40, prompt=1)
