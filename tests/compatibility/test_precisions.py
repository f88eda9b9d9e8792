"""Precisions of the Trainer, dtypes of the backbone, and gradient scaling with several optimizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from grit_lightning.optimizers import EigenbasisAdam, NaturalAdam

from .cases import Case, loader
from .conftest import Compare
from .running import LEARNING_RATE
from .tiny_models import WIDE

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "transformer-engine")
SCALED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "EigenbasisAdam": EigenbasisAdam,
    "NaturalAdam": NaturalAdam,
    "AdamW": torch.optim.AdamW,
    "AdamW, `fused`": partial(torch.optim.AdamW, fused=True),
    "SGD": torch.optim.SGD,
}
BACKBONES: dict[str, tuple[dict[str, Any], str]] = {
    "`dtype: bfloat16`, 32-true": ({"dtype": "bfloat16"}, "32-true"),
    "`dtype: bfloat16`, bf16-mixed": ({"dtype": "bfloat16"}, "bf16-mixed"),
    "`dtype: float16`, 32-true": ({"dtype": "float16"}, "32-true"),
    "`dtype: float16`, 16-mixed": ({"dtype": "float16"}, "16-mixed"),
    "`quantization: nf4`, 32-true": ({"quantization": "nf4"}, "32-true"),
    "`quantization: nf4`, bf16-mixed": ({"quantization": "nf4", "dtype": "bfloat16"}, "bf16-mixed"),
    "`quantization: nf4`, bf16-true": ({"quantization": "nf4", "dtype": "bfloat16"}, "bf16-true"),
}


def _scaling() -> dict[str, Any]:
    return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}


def _case(name: str, trainer: Callable[[], dict[str, Any]], model: dict[str, Any], needs: str = "") -> Case:
    return Case(
        name,
        backbone=WIDE if "quantization" in model else "Llama",
        model=model,
        trainer=lambda: {"max_steps": -1, "max_epochs": 2} | trainer(),
        loader=lambda: loader(2),
        resumes=True,
        needs=needs,
    )


CASES = [
    *(_case(name, lambda name=name: {"precision": name}, {}) for name in PRECISIONS),
    _case("16-true, torch.optim.AdamW", lambda: {"precision": "16-true"}, {"optimizer": torch.optim.AdamW}),
    *(
        _case(f"16-mixed with a gradient scaler, {name}", _scaling, {"optimizer": partial(optimizer, lr=LEARNING_RATE)})
        for name, optimizer in SCALED.items()
    ),
    *(
        _case(name, lambda precision=precision: {"precision": precision}, model, "bitsandbytes" * ("nf4" in name))
        for name, (model, precision) in BACKBONES.items()
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_precision_trains_as_the_page_says(case: Case, compare: Compare) -> None:
    compare("Precisions", CASES, case)
