"""Training does not notice general text until it is used: bit for bit, and one forward and backward pass each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from grit_lightning.callbacks import RankAdaptation, Reprojection
from grit_lightning.optimizers import EigenbasisAdam

Factory = Callable[..., Any]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}/{index}")
    else:
        yield name, value.tolist() if isinstance(value, Tensor) else value


def different(one: Any, other: Any) -> list[str]:
    """Names of all leaves that differ in a bit."""
    here, there = dict(leaves(one)), dict(leaves(other))
    return [name for name in here.keys() | there.keys() if here.get(name) != there.get(name)]


@pytest.mark.parametrize(
    "settings",
    [{"mode": "at_end", "every_n_steps": 2}, {"mode": "periodic", "edit_every_n_steps": 2}, {"mode": "penalty"}],
    ids=lambda settings: settings["mode"],
)
def test_a_run_that_edits_nothing_is_to_the_bit_the_run_without(
    quick_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    retention: Factory,
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    def train(*callbacks: Callback) -> dict[str, Any]:
        steers = [
            Reprojection("balanced", every_n_steps=2),
            RankAdaptation(every_n_steps=3, threshold=0.9, min_rank=1, mixing_probability=0.5),
        ]
        module = quick_module(optimizer=lambda p: EigenbasisAdam(p, lr=1e-2))
        trainer = make_trainer(callbacks=[*callbacks, *steers], accumulate_grad_batches=2)
        pl.seed_everything(5, verbose=False)
        trainer.fit(module, loader(12))
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        saved: dict[str, Any] = torch.load(tmp_path / "end.ckpt", weights_only=True)
        saved["callbacks"] = {key: of for key, of in saved["callbacks"].items() if "Retention" not in key}
        return saved

    without, beside = train(), train(retention(mu=0.0, **settings))
    assert without["state_dict"].keys()
    assert different(without, beside) == []


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({"every_n_steps": 1}, 6),
        ({"every_n_steps": 2}, 3),
        ({"every_n_steps": 2, "start_step": 3, "stop_step": 4}, 1),
        ({"every_n_steps": None}, 6),  # 12 blocks, two a micro-batch, once
        ({"every_n_steps": 3, "mode": "periodic", "edit_every_n_steps": 4}, 2),
        ({"every_n_steps": 2, "mode": "penalty"}, 3),
    ],
    ids=str,
)
def test_general_text_costs_one_pass_of_the_model_when_it_is_due(
    quick_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    retention: Factory,
    settings: dict[str, Any],
    calls: int,
) -> None:
    seen: list[tuple[int, ...]] = []

    class Count(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            embedding = pl_module.model.get_input_embeddings()
            embedding.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))

    trainer = make_trainer(callbacks=[retention(**settings), Count()], max_steps=6, max_epochs=-1)
    trainer.fit(quick_module(), loader(8))
    assert seen.count((2, 32)) == calls
    assert len(seen) == 6 + calls


def test_modes_and_gradients_are_left_as_they_were(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory
) -> None:
    states: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            gradients = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]
            states.append((gradients, [module.training for module in pl_module.modules()]))

    trainer = make_trainer(callbacks=[Look(), retention(), Look()], max_steps=2, max_epochs=-1)
    trainer.fit(quick_module(), loader(4))
    for before, after in zip(states[::2], states[1::2], strict=True):
        assert before[0] != []
        assert different(before, after) == []
        assert any(before[1])
