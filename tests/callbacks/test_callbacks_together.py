"""What two callbacks that set ranks do together, that what is counted is what is exported, and settings that cannot act."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from grit_lightning.callbacks import RankAdaptation, Reprojection
from grit_lightning.export.compaction import compact
from grit_lightning.export.peft_names import named_by_peft
from grit_lightning.module import GritLitModule

Factory = Callable[..., Any]


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [
        ([Reprojection(k=2), RankAdaptation()], True),
        ([RankAdaptation(), Reprojection(k=2, trigger="angle_drift")], True),
        ([Reprojection(), RankAdaptation(max_rank=4)], False),
        ([Reprojection(k=2, blend=0.5), RankAdaptation()], False),  # sets no rank
        ([Reprojection(k=2, stop_step=10), RankAdaptation(start_step=11)], False),  # one after the other
        ([Reprojection(k=2, start_step=10), RankAdaptation(stop_step=10)], True),
        ([Reprojection(k=2), Reprojection("balanced")], False),
        ([RankAdaptation(), RankAdaptation("balanced")], True),
        ([RankAdaptation(stop_step=4), RankAdaptation("balanced", start_step=5)], False),
    ],
)
def test_two_that_would_set_ranks_at_the_same_time_are_refused(
    make_module: Factory, make_trainer: Factory, loader: Factory, callbacks: list[Callback], expected: bool
) -> None:
    match = r"Reprojection\.k .*: expected null beside RankAdaptation|RankAdaptation: expected one at a time"
    with pytest.raises(ValueError, match=match) if expected else contextlib.nullcontext():
        make_trainer(callbacks=callbacks).fit(make_module(), loader(2), loader(1))


@pytest.mark.parametrize("steps", range(2, 9))
def test_the_counted_parameters_are_those_of_the_exported_adapter(
    make_module: Factory, make_trainer: Factory, loader: Factory, steps: int
) -> None:
    """Also where the last step has raised ranks, whose columns have not grown yet."""
    module, ranks = (
        make_module(),
        RankAdaptation("balanced", threshold=0.8, min_rank=1, every_n_steps=2, return_ratio=1.0),
    )
    make_trainer(callbacks=[Reprojection("balanced", every_n_steps=2), ranks], max_steps=steps).fit(
        module, loader(8), loader(1)
    )
    assert module.geometry.effective_parameters == exported(module)
    assert any(decision.new < decision.old for decision in ranks.decisions)


def exported(module: GritLitModule) -> int:
    return compact(module.adapter_config, named_by_peft(module.peft_model), module.geometry.ranks).parameters


def test_some_run_of_those_ends_with_a_raised_rank(
    make_module: Factory, make_trainer: Factory, loader: Factory
) -> None:
    """What the test above is about does happen: the ranks allow more than has grown."""
    module, ranks = (
        make_module(),
        RankAdaptation("balanced", threshold=0.8, min_rank=1, every_n_steps=2, return_ratio=1.0),
    )
    make_trainer(callbacks=[ranks], max_steps=4).fit(module, loader(8), loader(1))
    raised = [decision for decision in ranks.decisions if decision.new > decision.old and decision.step == 4]
    assert raised
    per_rank = {site.name: site.parameters_per_rank for group in module.geometry.groups for site in group.sites}
    allowed = sum(rank * per_rank[name] for name, rank in module.geometry.ranks.items())
    assert module.geometry.effective_parameters < allowed


@pytest.mark.parametrize(
    ("callback", "ignored"),
    [
        (lambda: Reprojection(mass_low=0.5, mass_high=0.9), ["mass_low", "mass_high"]),
        (lambda: Reprojection(trigger="mass_ratio", mass_low=0.5, max_drift=0.1), ["max_drift"]),
        (lambda: Reprojection(trigger="angle_drift", mass_high=0.9, max_drift=0.1), ["mass_high"]),
        (lambda: Reprojection("balanced", keep_dropped=False, preserve_volume=False, blend=0.5), ["keep_dropped"]),
        (lambda: Reprojection("two_sided", keep_dropped=False, preserve_volume=False, blend=0.5), ["preserve_volume"]),
        (lambda: RankAdaptation("kl_budget", threshold=0.5, budget=0.1, return_ratio=3.0), ["threshold"]),
        (lambda: RankAdaptation("balanced", threshold=0.5, return_ratio=None, hysteresis=0.1), []),
        (lambda: RankAdaptation("energy", threshold=0.5, return_ratio=3.0, seed=7), ["return_ratio", "seed"]),
        (lambda: RankAdaptation("energy", mixing_probability=0.1, seed=7, entropy_floor=True), []),
    ],
)
def test_a_changed_setting_that_nothing_reads_is_said_once(
    make_module: Factory, make_trainer: Factory, loader: Factory, callback: Callable[[], Callback], ignored: list[str]
) -> None:
    given = callback()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks=[given]).fit(make_module(), loader(2), loader(1))
    said = [str(w.message).partition(":")[0] for w in caught if "nothing reads it here" in str(w.message)]
    assert sorted(said) == sorted(f"{type(given).__name__}.{name}" for name in ignored)
