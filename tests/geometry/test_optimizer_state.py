"""Optimizers whose state can follow no change of coordinates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from grit_lightning.geometry.optimizer_state import AveragesWeights, require_followable


class _Distance(torch.optim.SGD):
    """Keeps an estimate of the distance from the start, where Prodigy and D-Adaptation keep theirs."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters)
        self.param_groups[0] |= {"d": 1e-6, "k": 0}


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, _Distance])
def test_state_that_cannot_follow_is_refused(kind: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(ValueError, match=rf"model\.optimizer: expected .* got {kind.__name__}.*Reprojection"):
        require_followable(kind([nn.Parameter(torch.ones(2))]))


def test_state_that_can_follow_or_begin_anew_is_not_refused() -> None:
    """Among them Adafactor, whose d is the length that updates are cut to."""
    for name in ("AdamW", "SGD", "Adafactor", "Muon", "Rprop"):
        require_followable(getattr(torch.optim, name)([nn.Parameter(torch.ones(2, 2))]))


def test_optimizers_of_torch_average_no_weights() -> None:
    """What is asked of their class: methods to switch, which none of them has."""
    for name in ("AdamW", "SGD", "LBFGS", "Adafactor", "Muon"):
        assert not isinstance(getattr(torch.optim, name)([nn.Parameter(torch.ones(2, 2))]), AveragesWeights)
