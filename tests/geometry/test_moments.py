"""What optimizers remember, through a change of coordinates: moments, packed moments, averages, and what nobody knows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_lightning import RankSpaceGeometry
from grit_lightning.functional import ReprojectionMaps
from grit_lightning.geometry import moments
from grit_lightning.geometry.moments import carry_moments
from grit_lightning.geometry.rank_group import RankGroup

RANK = 2
"""Effective rank after the change, of 4."""
EIGHT_BIT = {"optim_bits": 8, "min_8bit_size": 16}  # the moments of smaller tensors stay in float32
EIGHT_BIT_ERROR = 0.03
"""Of the whole moment: a byte keeps about two digits."""


@pytest.fixture
def group(make_geometry: Callable[..., Any]) -> RankGroup:
    geometry: RankSpaceGeometry = make_geometry()[1]
    (group,) = geometry.groups
    return group


@pytest.fixture
def maps(group: RankGroup) -> ReprojectionMaps:
    """Any maps for all layers but the first, whose coordinates stay."""
    a_map = torch.randn(len(group.sites), group.r, group.r) + 2 * torch.eye(group.r)
    a_map[0] = torch.eye(group.r)
    b_map = torch.linalg.inv(a_map)
    b_map[0] = torch.eye(group.r)
    return ReprojectionMaps(a_map, b_map)


def factors(group: RankGroup) -> list[Tensor]:
    return [*group.factors("a"), *group.factors("b")]


def take_step(optimizer: Optimizer, parameters: Iterable[Tensor], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def expected(group: RankGroup, maps: ReprojectionMaps, before: dict[Tensor, Tensor], kind: str) -> dict[Tensor, Tensor]:
    """Derive what must become of a part of the state, one factor after the other."""
    result = {}
    for side in ("a", "b"):
        for index, factor in enumerate(group.factors(side)):
            a_map, b_map = maps.a_map[index], maps.b_map[index]
            left = a_map if (side == "a") == (kind == "weights") else b_map
            left = left if kind == "weights" else left.T
            left = left.square() if kind == "second" else left
            kept = torch.arange(group.r) < group.ranks[index]
            if side == "a":
                value = left @ before[factor]
                result[factor] = value if kind == "weights" else value * kept[:, None]
            else:
                result[factor] = before[factor] @ left * kept
    return result


def parts(optimizer: Optimizer, parameters: list[Tensor], name: str) -> list[dict[Tensor, Tensor]]:
    """Return a part of the state of all parameters: as numbers, and for each of several that are stacked."""
    values = {p: _numbers(optimizer.state[p], name) for p in parameters}
    if all(value.shape == p.shape for p, value in values.items()):
        return [values]
    return [{p: value[index] for p, value in values.items()} for index in range(2)]


def _numbers(state: dict[str, Tensor], name: str) -> Tensor:
    value = state[name]
    if value.dtype != torch.uint8:
        return value.clone()
    number = name[-1]
    flat = state["qmap" + number][value.long()].reshape(*state["absmax" + number].shape[:-1], -1)
    scales = state["absmax" + number].repeat_interleave(256, dim=-1)[..., : flat.shape[-1]]
    return (flat * scales).reshape(value.shape)


def assert_carried(optimizer: Optimizer, group: RankGroup, maps: ReprojectionMaps, kinds: dict[str, str]) -> None:
    parameters = factors(group)
    before = {name: parts(optimizer, parameters, name) for name in kinds}
    group.ranks[1:] = RANK
    carry_moments(optimizer, group, maps)
    for name, kind in kinds.items():
        for old, found in zip(before[name], parts(optimizer, parameters, name), strict=True):
            for p, want in expected(group, maps, old, kind).items():
                packed = optimizer.state[p][name].dtype == torch.uint8
                bound = EIGHT_BIT_ERROR if packed else 1e-5
                assert (found[p] - want).norm() <= bound * want.norm()
                assert bool((found[p][want == 0] == 0).all())  # beyond the rank nothing pushes


class _ScheduleFree(torch.optim.SGD):
    """Keeps z, and says that it averages weights by methods that switch to the average and back."""

    def train(self) -> None:
        raise NotImplementedError

    def eval(self) -> None:
        raise NotImplementedError

    def step(self, closure: Any = None) -> Any:
        for settings in self.param_groups:
            for p in settings["params"]:
                self.state[p]["z"] = p.detach() + 1.0
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), {"exp_avg": "first", "max_exp_avg_sq": "second"}),
        (lambda p: torch.optim.RMSprop(p, centered=True), {"grad_avg": "first", "square_avg": "second"}),
        (lambda p: torch.optim.ASGD(p, t0=0), {"ax": "weights"}),
        (_ScheduleFree, {"z": "weights"}),
    ],
    ids=["AdamW", "RMSprop", "ASGD", "schedule-free"],
)
def test_state_follows_by_its_meaning(
    group: RankGroup, maps: ReprojectionMaps, make: Callable[..., Optimizer], kinds: dict[str, str]
) -> None:
    optimizer = make(factors(group))
    take_step(optimizer, factors(group))
    assert_carried(optimizer, group, maps, kinds)


@pytest.mark.parametrize("packed", [False, True], ids=["32 bit", "8 bit"])
@pytest.mark.parametrize(
    ("name", "settings", "kinds"),
    [
        ("AdamW", {}, {"state1": "first", "state2": "second"}),
        ("LAMB", {}, {"state1": "first", "state2": "second"}),
        ("AdEMAMix", {}, {"state1": "first", "state2": "second"}),
        ("Lion", {}, {"state1": "first"}),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, {"state1": "first"}),
        ("RMSprop", {}, {"state1": "second"}),
    ],
)
def test_state_of_bitsandbytes_follows_packed_or_not(
    group: RankGroup, maps: ReprojectionMaps, name: str, settings: dict[str, Any], kinds: dict[str, str], packed: bool
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer = getattr(bitsandbytes.optim, name)(factors(group), **settings, **(EIGHT_BIT if packed else {}))
    take_step(optimizer, factors(group))
    assert (optimizer.state[factors(group)[0]]["state1"].dtype == torch.uint8) is packed
    assert_carried(optimizer, group, maps, kinds)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adamax(p, lr=0.01),
        lambda p: torch.optim.Adafactor(p, lr=0.01),
        lambda p: torch.optim.Rprop(p, lr=0.01),
    ],
    ids=["Adamax", "Adafactor", "Rprop"],
)
def test_an_optimizer_with_other_state_begins_anew_where_coordinates_change(
    group: RankGroup, maps: ReprojectionMaps, make: Callable[..., Optimizer]
) -> None:
    """A part of it alone would not fit the rest: old momenta over new scales make steps of any length."""
    parameters = factors(group)
    optimizer = make(parameters)
    take_step(optimizer, parameters)
    unmoved = (group.factors("a")[0], group.factors("b")[0])
    kept = [copy.deepcopy(optimizer.state[p]) for p in unmoved]
    with pytest.warns(UserWarning, match=f"{type(optimizer).__name__} keeps state .* begins anew"):
        carry_moments(optimizer, group, maps)
    for p, state in zip(unmoved, kept, strict=True):
        assert all(
            torch.equal(torch.as_tensor(state[name]), torch.as_tensor(optimizer.state[p][name])) for name in state
        )
    moved = [p for p in parameters if not any(p is other for other in unmoved)]
    twins = [p.detach().clone().requires_grad_() for p in moved]
    for p in unmoved:
        p.grad = None
    take_step(optimizer, moved, seed=1)
    take_step(make(twins), twins, seed=1)
    assert all(torch.equal(p, twin) for p, twin in zip(moved, twins, strict=True))


def test_the_warning_names_the_place_it_comes_from(group: RankGroup, maps: ReprojectionMaps) -> None:
    optimizer = torch.optim.Adamax(factors(group))
    take_step(optimizer, factors(group))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        carry_moments(optimizer, group, maps)
    assert [Path(each.filename) for each in caught] == [Path(moments.__file__)]


class _Nested(torch.optim.SGD):
    """Keeps a matrix in a list, as Shampoo does."""

    def step(self, closure: Any = None) -> Any:
        for settings in self.param_groups:
            for p in settings["params"]:
                self.state[p]["preconditioners"] = [torch.eye(len(p))]
        return super().step(closure)


def test_state_inside_lists_is_not_overlooked(group: RankGroup, maps: ReprojectionMaps) -> None:
    optimizer = _Nested(factors(group))
    take_step(optimizer, factors(group))
    with pytest.warns(UserWarning, match="preconditioners"):
        carry_moments(optimizer, group, maps)
    assert group.factors("a")[1] not in optimizer.state


class _ByName(torch.optim.SGD):
    """Keeps momenta under the names of layers, as PEFT's LoRA-FA does."""

    def step(self, closure: Any = None) -> Any:
        self.state["layers.0.lora"]["exp_avg_B"] = torch.ones(2, 2)
        return super().step(closure)


def test_state_that_is_kept_by_names_is_not_overlooked(group: RankGroup, maps: ReprojectionMaps) -> None:
    optimizer = _ByName(factors(group))
    take_step(optimizer, factors(group))
    with pytest.warns(UserWarning, match=r"layers\.0\.lora"):
        carry_moments(optimizer, group, maps)
    assert not optimizer.state
