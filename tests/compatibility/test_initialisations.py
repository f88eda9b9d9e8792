"""Every value of `init_lora_weights`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from peft import PeftConfig

from .conftest import Compare
from .running import Case, lora

VALUES = (
    *(True, False, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_2", "mica"),
    *("loftq", "eva", "corda", "lora_ga"),
)


def _adapter(value: bool | str) -> Callable[[], PeftConfig]:
    return lambda: lora(init_lora_weights=value, target_modules=["q_proj", "v_proj"])


CASES = [Case(f"`{str(value).lower()}`", adapter=_adapter(value), exports=True) for value in VALUES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_initialisation_trains_as_the_page_says(case: Case, compare: Compare) -> None:
    compare("Initialisations", CASES, case)
