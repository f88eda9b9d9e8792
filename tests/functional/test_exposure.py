"""The penalty's gradients against autograd through the dense form, in float64, and what a change of gauge does to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grit_lightning import functional as F

D_IN, D_OUT, R, SCALING, MU = 7, 6, 3, 2.0, 0.3


@pytest.fixture
def layer() -> dict[str, Tensor]:
    """A, B, and the covariances of the input and of the gradient at the output."""
    torch.manual_seed(1)
    inputs, deltas = torch.randn(20, D_IN, dtype=torch.float64), torch.randn(20, D_OUT, dtype=torch.float64)
    return {
        "a": torch.randn(R, D_IN, dtype=torch.float64),
        "b": torch.randn(D_OUT, R, dtype=torch.float64),
        "x": inputs.T @ inputs / 20,
        "delta": deltas.T @ deltas / 20,
    }


def gradients(layer: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the function makes of a layer's moments."""
    a, b, x, delta = (layer[name] for name in ("a", "b", "x", "delta"))
    moments = (a @ x @ a.T, SCALING**2 * b.T @ delta @ b, a @ x, SCALING**2 * delta @ b)
    of_a, of_b = F.exposure_gradients(*(moment[None] for moment in moments), mu=MU)
    return of_a[0], of_b[0]


def test_gradients_are_those_of_the_dense_penalty(layer: dict[str, Tensor]) -> None:
    a, b = layer["a"].clone().requires_grad_(), layer["b"].clone().requires_grad_()
    update = SCALING * b @ a
    penalty = MU * 0.5 * torch.trace(layer["delta"] @ update @ layer["x"] @ update.T)
    expected = torch.autograd.grad(penalty, (a, b))
    torch.testing.assert_close(gradients(layer), expected)


def test_the_gradient_of_b_is_that_of_an_edit_at_the_identity(layer: dict[str, Tensor]) -> None:
    a, b, x, delta = (layer[name] for name in ("a", "b", "x", "delta"))
    general_a, general_g = a @ x @ a.T, SCALING**2 * b.T @ delta @ b
    edit = torch.eye(R, dtype=torch.float64, requires_grad=True)
    cost = MU * 0.5 * torch.trace(edit.T @ general_g @ edit @ general_a)
    (expected,) = torch.autograd.grad(cost, edit)
    torch.testing.assert_close(b.T @ gradients(layer)[1], expected)


def test_gradients_follow_a_change_of_gauge(layer: dict[str, Tensor]) -> None:
    """(A, B) → (T A, B T⁻¹): ∇A → T⁻ᵀ ∇A, ∇B → ∇B Tᵀ, as those of any function of ΔW."""
    t = torch.randn(R, R, dtype=torch.float64)
    changed = gradients({**layer, "a": t @ layer["a"], "b": layer["b"] @ t.inverse()})
    of_a, of_b = gradients(layer)
    torch.testing.assert_close(changed, (t.inverse().T @ of_a, of_b @ t.T))


@pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf")])
def test_a_weight_out_of_range_is_refused(mu: float) -> None:
    with pytest.raises(ValueError, match=r"mu: expected a finite number ≥ 0, got"):
        F.exposure_gradients(*torch.ones(4, 1, 1, 1), mu=mu)
