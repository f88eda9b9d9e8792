"""What cannot work is refused before anything is trained, in one sentence that names the setting."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging

from grit_lightning.callbacks import ForgettingProbe, Retention
from grit_lightning.module import GritLitModule

Factory = Callable[..., Any]
ONE: list[Any] = [{"source": "a.txt"}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"Retention\.texts: expected general text, got none"),
        ({"texts": []}, r"Retention\.texts: expected general text, got none"),
        ({"texts": ONE * 2}, r"Retention\.texts: expected different names, got several called a"),
        ({"texts": ONE, "mode": "always"}, r"Retention\.mode: expected at_end, periodic or penalty"),
        ({"texts": ONE, "mu": -0.1}, r"Retention\.mu: expected a number ≥ 0"),
        ({"texts": ONE, "mu": float("nan")}, r"Retention\.mu: expected a number ≥ 0"),
        (
            {"texts": ONE, "task_tolerance": -0.1},
            r"Retention\.task_tolerance: expected null, or in mode at_end a number",
        ),
        ({"texts": ONE, "task_tolerance": 0.1, "mode": "penalty"}, r"Retention\.task_tolerance: .* in mode at_end"),
        ({"texts": ONE, "damping": -1.0}, r"Retention\.damping: expected a number ≥ 0"),
        ({"texts": ONE, "ema_beta": 1.0}, r"Retention\.ema_beta: expected a number in \[0, 1\)"),
        ({"texts": ONE, "weights": {"b": 1.0}}, r"Retention\.weights: expected names among a"),
        ({"texts": ONE, "weights": {"a": 0.0}}, r"Retention\.weights: expected numbers ≥ 0, one of them above 0"),
        ({"texts": ONE, "weights": {"a": -1.0}}, r"Retention\.weights: expected numbers ≥ 0, one of them above 0"),
        ({"texts": ONE, "every_n_steps": 0}, r"Retention\.every_n_steps: expected an integer ≥ 1"),
        ({"texts": ONE, "every_n_steps": None, "mode": "periodic"}, r"Retention\.every_n_steps: .* in mode periodic"),
        ({"texts": ONE, "every_n_steps": None, "mode": "penalty"}, r"Retention\.every_n_steps: .* in mode penalty"),
        (
            {"texts": ONE, "every_n_steps": None, "metric": "retention"},
            r"Retention\.every_n_steps: .* metric retention",
        ),
        ({"texts": ONE, "metric": "both"}, r"Retention\.metric: expected task or retention"),
        ({"texts": ONE, "edit_every_n_steps": 0}, r"Retention\.edit_every_n_steps: expected an integer ≥ 1"),
        ({"texts": ONE, "block_size": 1}, r"Retention\.block_size: expected an integer ≥ 2"),
        ({"texts": ONE, "max_blocks": 0}, r"Retention\.max_blocks: expected an integer ≥ 1"),
        ({"texts": ONE, "batch_size": 0}, r"Retention\.batch_size: expected an integer ≥ 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Retention(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"texts": [{"source": "nosuch.txt"}]}, FileNotFoundError, "expected a file, got nosuch.txt"),
        ({"block_size": 129}, ValueError, r"at most 128 tokens.*got 129 .* Lower Retention\.block_size"),
        ({"max_blocks": 1}, ValueError, r"Retention\.texts: expected at least 40 tokens .*, got 32"),
        ({"tokenizer": None}, MisconfigurationException, r"Retention\.tokenizer: expected a tokenizer"),
    ],
    ids=["file", "context", "tokens", "tokenizer"],
)
def test_text_that_cannot_be_used(
    quick_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    retention: Factory,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        make_trainer(callbacks=[retention(**settings)], max_steps=1).fit(quick_module(), loader(2))


def test_text_in_the_tokens_of_another_model(
    make_tiny_llama: Factory, lora_config: Factory, loader: Factory, make_trainer: Factory, retention: Factory
) -> None:
    module = GritLitModule(make_tiny_llama(vocab_size=50), lora_config())
    with pytest.raises(ValueError, match=r"Retention\.tokenizer: expected that of the backbone"):
        make_trainer(callbacks=[retention()], max_steps=1).fit(module, loader(2))


def test_a_module_without_geometry(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory
) -> None:
    with pytest.raises(MisconfigurationException, match="Retention: expected a module with a rank-space geometry"):
        make_trainer(callbacks=[retention()], max_steps=1).fit(quick_module(geometry=None), loader(2))


def test_a_tolerance_without_validation_rows(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory
) -> None:
    trainer = make_trainer(callbacks=[retention(task_tolerance=0.1)], max_steps=1)
    with pytest.raises(MisconfigurationException, match=r"Retention\.task_tolerance: expected a .* without them"):
        trainer.fit(quick_module(), loader(2))


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.parametrize("mode", ["at_end", "periodic", "penalty"])
def test_an_average_of_weights_goes_with_the_penalty_alone(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory, mode: str
) -> None:
    trainer = make_trainer(callbacks=[retention(mode=mode), EMAWeightAveraging(decay=0.5)], max_steps=1)
    refuses = pytest.raises(MisconfigurationException, match="expected no average of the weights beside Retention")
    with contextlib.nullcontext() if mode == "penalty" else refuses:
        trainer.fit(quick_module(), loader(2))


def test_an_optimizer_that_cannot_follow_an_edit(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory
) -> None:
    module = quick_module(optimizer=lambda p: torch.optim.LBFGS(p))
    with pytest.raises(ValueError, match="LBFGS"):
        make_trainer(callbacks=[retention(mode="periodic")], max_steps=1).fit(module, loader(2))


def test_two_of_them(quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory) -> None:
    trainer = make_trainer(callbacks=[retention(), retention(mode="penalty")], max_steps=1)
    with pytest.raises(ValueError, match="Retention: expected one at a time, got several"):
        trainer.fit(quick_module(), loader(2))


@pytest.mark.parametrize("same", [True, False])
def test_a_probe_of_the_same_documents_is_named(
    quick_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    retention: Factory,
    general: Path,
    tiny_backbone_dir: Path,
    same: bool,
) -> None:
    """Found by content: here in blocks of another size, under another name."""
    copy = general.with_name("copy.txt")
    copy.write_text(general.read_text() if same else "Something else is written here. " * 20)
    text: Any = {"source": str(copy)}
    probe = ForgettingProbe([text], block_size=40, max_blocks=3, tokenizer=str(tiny_backbone_dir))
    said = pytest.warns(UserWarning, match=r"expected other documents .* got 3 of the 3 blocks of copy in both")
    with said if same else warnings.catch_warnings():
        make_trainer(callbacks=[probe, retention()], max_steps=1).fit(quick_module(), loader(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edit_every_n_steps": 7}, r"Retention\.edit_every_n_steps: expected 50, .* It acts with mode: periodic"),
        ({"metric": "retention"}, r"Retention\.metric: .* It acts with Reprojection, mode balanced, or RankAdaptation"),
        ({"every_n_steps": None, "ema_beta": 0.5}, r"Retention\.ema_beta: .* It acts with every_n_steps as a number"),
    ],
    ids=["interval", "metric", "decay"],
)
def test_settings_that_nothing_reads_are_named(
    quick_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    retention: Factory,
    settings: dict[str, Any],
    message: str,
) -> None:
    with pytest.warns(UserWarning, match=message):
        make_trainer(callbacks=[retention(**settings)], max_steps=1).fit(quick_module(), loader(2))
