"""Every value of `init_lora_weights`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftConfig

from grit_lightning import GritLitModule

from .cases import Case, lora
from .conftest import Compare
from .watching import Run, require

VALUES = (
    *(True, False, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_2", "mica"),
    *("loftq", "eva", "corda", "lora_ga"),
)


def _adapter(value: bool | str) -> Callable[[], PeftConfig]:
    more = {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}} if value == "loftq" else {}
    return lambda: lora(init_lora_weights=value, target_modules=["q_proj", "v_proj"], **more)


def _starts_elsewhere(run: Run) -> None:
    """Check that an initialisation is not simply that of `true` under another name."""
    torch.manual_seed(0)
    ordinary = GritLitModule(run.module.hparams["backbone"], _adapter(True)(), geometry=None, dtype="float32")
    ordinary.configure_model()
    start = Run(run.case, ordinary).trained()
    require(
        any(not torch.equal(start[name], run.start[name]) for name in run.start), "the adapter starts as with `true`"
    )


def _starts_on_principal_directions(run: Run) -> None:
    """Check that A begins with directions of the inputs' variance: EVA's rows are orthonormal."""
    factors = [value for name, value in run.start.items() if ".lora_A." in name]
    orthonormal = all(torch.allclose(factor @ factor.T, torch.eye(len(factor)), atol=1e-4) for factor in factors)
    require(orthonormal, "the rows of A are no principal directions: no data have been seen")


CHECKS = {"eva": _starts_on_principal_directions}

CASES = [
    Case("`true`", adapter=_adapter(True), exports=True),
    *(
        Case(
            f"`{str(value).lower()}`", adapter=_adapter(value), exports=True, check=CHECKS.get(value, _starts_elsewhere)
        )
        for value in VALUES[1:]
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_initialisation_trains_as_the_page_says(case: Case, compare: Compare) -> None:
    compare("Initialisations", CASES, case)
