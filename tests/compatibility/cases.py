"""What a row of the page is made of: a case, and what can come of it. And the data that every case is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from peft import LoraConfig, PeftConfig
from torch import Tensor
from torch.utils.data import DataLoader

from grit_lightning import GritLitModule

from .tiny_models import VOCAB_SIZE

if TYPE_CHECKING:
    from .watching import Run

WORKS, WITHOUT_GEOMETRY, REFUSED = "works", "works without geometry", "refused"
REFUSED_LATE, CRASHES, WRONG = "refused late", "crashes", "silently wrong"
FAULTS = (REFUSED_LATE, CRASHES, WRONG)
"""Outcomes that no row should have: time is lost, or what is there is not what was asked for."""

STEPS, ROWS, TOKENS = 4, 2, 12
MARKED = (5, 6)
"""Tokens that every row has, for methods that train or wait for some tokens only."""

Batch = dict[str, Tensor]


def lora(**settings: Any) -> LoraConfig:
    """Rank 4 on every linear layer, as most people start."""
    return LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
    )


@dataclass(frozen=True)
class Case:
    """One row of the page.

    Attributes:
        name: First cell of the row.
        backbone: Name in `tiny_models`.
        adapter: Makes the PEFT configuration.
        model: Other settings of `GritLitModule`; `optimizer` replaces the default, with and without geometry.
        trainer: Makes settings of the Trainer, callbacks among them.
        fit: What to call instead of `trainer.fit(module, loader, validation_loader)`.
        loader: Makes the training data.
        steps: Optimizer steps that are asked for; None if nobody can know.
        check: Looks whether what is special about the case has happened, and raises with `require` if it has not.
        resumes: Whether a run that is stopped after its first epoch and resumed must give the same weights.
        exports: Whether an export is a part of the case.
        needs: What must be there, or the case is skipped: `package`, or `package:attribute`.
        slow: Whether the row is made only when the page is written; a faster test elsewhere holds what it says.
    """

    name: str
    backbone: str = "Llama"
    adapter: Callable[[], PeftConfig] = lora
    model: Mapping[str, Any] = field(default_factory=dict)
    trainer: Callable[[], dict[str, Any]] = dict
    fit: Callable[[Trainer, GritLitModule, Any, Any], None] = lambda trainer, *rest: trainer.fit(*rest)
    loader: Callable[[], Any] = lambda: loader()
    steps: int | None = STEPS
    check: Callable[[Run], None] = lambda run: None
    resumes: bool = False
    exports: bool = False
    needs: str = ""
    slow: bool = False


@dataclass(frozen=True)
class Outcome:
    """The rest of the row: what came of a case, whether it can be exported, and what was said or left out."""

    status: str
    export: str = ""
    words: str = ""


def batches(count: int = STEPS) -> list[Batch]:
    """Rows of random tokens with padding at their end, none of it learnt."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(8, VOCAB_SIZE - 8, (ROWS, TOKENS), generator=generator)  # the last ids stand for images
        ids[:, 1:3] = torch.tensor(MARKED)
        real = torch.arange(TOKENS) < torch.tensor([[TOKENS], [TOKENS - 3]])
        ids = ids.masked_fill(~real, 0)
        made.append({"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)})
    return made


def loader(count: int = STEPS) -> DataLoader[Any]:
    return DataLoader(batches(count), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
