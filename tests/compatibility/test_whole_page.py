"""The page as a whole: every case has its row, every row its case, and no fault is forgotten."""

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

KNOWN_FAULTS: dict[str, set[str]] = {
    "Models": {
        "Mixtral",
        "Qwen3Moe",
        "DeepseekV3",
        "Bert",
        "LlamaForSequenceClassification with tied embeddings",
        "BertForMaskedLM",
        "Gemma3",
        "Whisper",
        "Mixtral, experts as `target_parameters`",
    },
    "PEFT methods": {
        "AdaLora",
        "CPT",
        "Cartridge",
        "Lily",
        "MultitaskPromptTuning",
        "Poly",
        "PromptEncoder",
        "PromptTuning",
        "Shadow",
    },
    "Variants of LoRA": {
        "`lora_bias`",
        "`layer_replication`",
        "`alora_invocation_tokens`",
        "`use_qalora`",
        "on `lm_head`, tied embeddings",
        "`modules_to_save: [embed_tokens]`, `ensure_weight_tying`, tied embeddings",
    },
    "Initialisations": {
        "`pissa_niter_2`",
        "`loftq`",
        "`eva`",
        "`corda`",
        "`lora_ga`",
    },
    "Averaged weights": {
        "`StochasticWeightAveraging`",
        "`EMAWeightAveraging`",
    },
    "Schedules of the learning rate": {
        "cosine, `max_epochs`, data without a length",
        "cosine, `max_time` alone",
        "cosine, `max_epochs: -1`",
        "cosine, `GradientAccumulationScheduler`",
    },
    "Trainer and model settings": {
        "resumed at the end of an epoch, `max_steps` and `max_epochs`",
        "`attn_implementation: flash_attention_2`",
    },
    "Lightning's callbacks": {
        "`BackboneFinetuning`",
        "`ModelPruning`",
    },
}
"""Rows that should not be as they are. A fault that is mended has to leave, one that is not here has to be mended."""


def test_every_table_is_on_the_page() -> None:
    assert page.titles() == list(TABLES)


@pytest.mark.parametrize("title", TABLES)
def test_every_case_has_its_row_and_every_row_its_case(title: str) -> None:
    assert list(page.rows(title)) == [case.name for case in TABLES[title]]


@pytest.mark.parametrize("title", TABLES)
def test_every_row_says_one_of_the_outcomes_of_the_page(title: str) -> None:
    assert {row.status for row in page.rows(title).values()} <= {WORKS, WITHOUT_GEOMETRY, REFUSED, *FAULTS}


def test_no_fault_is_new_or_forgotten() -> None:
    faults = {
        title: {
            name
            for name, row in page.rows(title).items()
            if row.status in FAULTS or any(fault in row.export for fault in FAULTS)
        }
        for title in TABLES
    }
    assert {title: names for title, names in faults.items() if names} == KNOWN_FAULTS


def test_numbers_may_differ_from_the_page_but_no_status_and_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Outcome(REFUSED, "", "adapter.r: expected a positive rank, got 0.")
    others = [replace(row, status=WORKS), replace(row, words="adapter.alpha: expected a positive rank, got 0.")]
    for made_with in (page.made_with(), "Made with other versions."):
        monkeypatch.setattr(page, "made_with", lambda line=made_with: line)
        assert page.comparable(row) == page.comparable(replace(row, words=row.words.replace("0", "-3")))
        assert all(page.comparable(row) != page.comparable(other) for other in others)
