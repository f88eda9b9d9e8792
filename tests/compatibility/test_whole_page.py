"""The page as a whole: every case has its row, every row its case, and no row is a fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from . import page
from . import test_initialisations as initialisations
from . import test_models as models
from . import test_optimizers as optimizers
from . import test_peft_methods as peft_methods
from . import test_precisions as precisions
from . import test_trainer_features as features
from .cases import FAULTS, REFUSED, WITHOUT_GEOMETRY, WORKS, Case, Outcome

TABLES: dict[str, Sequence[Case]] = {
    "Models": models.CASES,
    "PEFT methods": peft_methods.CASES,
    "Variants of LoRA": peft_methods.VARIANT_CASES,
    "Initialisations": initialisations.CASES,
    "Optimizers": optimizers.CASES,
    "Optimizers under reprojection": optimizers.REPROJECTED,
    "Precisions": precisions.CASES,
    "Finding learning rates and batch sizes": features.TUNER,
    "Averaged weights": features.AVERAGES,
    "Schedules of the learning rate": features.SCHEDULES,
    "Trainer and model settings": features.FEATURES,
    "Lightning's callbacks": features.CALLBACKS,
}


def test_every_table_is_on_the_page() -> None:
    assert page.titles() == list(TABLES)


@pytest.mark.parametrize("title", TABLES)
def test_every_case_has_its_row_and_every_row_its_case(title: str) -> None:
    assert list(page.rows(title)) == [case.name for case in TABLES[title]]


@pytest.mark.parametrize("title", TABLES)
def test_every_row_says_one_of_the_outcomes_of_the_page(title: str) -> None:
    assert {row.status for row in page.rows(title).values()} <= {WORKS, WITHOUT_GEOMETRY, REFUSED, *FAULTS}


def test_no_row_is_a_fault() -> None:
    faults = {
        title: {
            name
            for name, row in page.rows(title).items()
            if row.status in FAULTS or any(fault in row.export for fault in FAULTS)
        }
        for title in TABLES
    }
    assert not {title: names for title, names in faults.items() if names}


def test_numbers_may_differ_from_the_page_but_no_status_and_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Outcome(REFUSED, "", "adapter.r: expected a positive rank, got 0.")
    others = [replace(row, status=WORKS), replace(row, words="adapter.alpha: expected a positive rank, got 0.")]
    for made_with in (page.made_with(), "Made with other versions."):
        monkeypatch.setattr(page, "made_with", lambda line=made_with: line)
        assert page.comparable(row) == page.comparable(replace(row, words=row.words.replace("0", "-3")))
        assert all(page.comparable(row) != page.comparable(other) for other in others)
