"""Families of models, each with LoRA on all linear layers."""

from __future__ import annotations

from functools import partial

import pytest

from .cases import Case, lora
from .conftest import Compare
from .tiny_models import CAUSAL, OTHER
from .watching import Run, require

ATTENTION = partial(lora, target_modules=["q_proj", "v_proj"])


def _is_what_was_saved(run: Run) -> None:
    """Check that the model is of the class that was saved, with all its weights: no head or encoder has been dropped."""
    saved, here = run.module.peft_model.config.architectures[0], type(run.module.peft_model.get_base_model()).__name__
    require(saved == here, f"trained as {here} without a word, though the folder says {saved}")


CASES = [
    *(Case(name, backbone=name, exports=True, needs=f"transformers:{name}Config") for name in CAUSAL),
    *(Case(name, backbone=name, exports=True, check=_is_what_was_saved) for name in OTHER),
    Case("Mixtral, `q_proj` and `v_proj`", backbone="Mixtral", adapter=ATTENTION, exports=True),
    Case("GptOss, `q_proj` and `v_proj`", backbone="GptOss", adapter=ATTENTION, exports=True),
    Case(
        "Mixtral, experts as `target_parameters`",
        backbone="Mixtral",
        adapter=partial(lora, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
        exports=True,
    ),
    Case(
        "Gemma3, language model only",
        backbone="Gemma3",
        adapter=partial(lora, target_modules=r".*language_model.*\.(q_proj|v_proj)"),
        exports=True,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_trains_as_the_page_says(case: Case, compare: Compare) -> None:
    compare("Models", CASES, case)
