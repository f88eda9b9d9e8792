"""The accumulation window by itself: gradients of full size, what is refused before a step, and going on in its middle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from grit_lightning.accumulation_window import AccumulationWindow

YES, NO = torch.tensor(True), torch.tensor(False)


def window_of(*losses: tuple[float, Tensor]) -> AccumulationWindow:
    window = AccumulationWindow()
    for loss, learns in losses:
        window.add_loss(torch.tensor(loss), learns)
        window.finish_micro_batch()
    return window


def test_a_full_window_leaves_gradients_alone_and_sums_its_losses() -> None:
    window, gradient = window_of((2.0, YES), (0.0, NO), (3.0, YES)), torch.tensor([1.0, -2.0])
    closed = window.close([gradient], 3, step=0, scaled=False)
    assert closed.loss_sums.tolist() == [5.0, 2.0]
    assert closed.finite
    assert gradient.tolist() == [1.0, -2.0]
    assert window.micro_batches == 0


def test_a_short_window_gets_gradients_of_full_size() -> None:
    gradients = [torch.tensor([1.0]), torch.tensor([[3.0]])]
    window_of((2.0, YES)).close(gradients, 4, step=0, scaled=False)
    assert [gradient.item() for gradient in gradients] == [4.0, 12.0]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_with_its_step(broken: float) -> None:
    with pytest.raises(
        FloatingPointError, match=r"Optimizer step 7: expected a finite training loss, got \[1\.0, (nan|inf)\]"
    ):
        window_of((1.0, YES), (broken, YES)).close([torch.ones(1)], 2, step=7, scaled=True)


def test_a_gradient_that_is_not_finite_is_refused_unless_a_scaler_skips_the_step() -> None:
    gradient = torch.tensor([torch.inf])
    with pytest.raises(
        FloatingPointError, match=r"expected a finite gradient, got one that is not, at a loss of \[1\.0\]"
    ):
        window_of((1.0, YES)).close([gradient], 1, step=0, scaled=False)
    assert not window_of((1.0, YES)).close([gradient], 1, step=0, scaled=True).finite


def test_a_window_without_labels_is_refused_only_if_no_process_has_any() -> None:
    with pytest.raises(
        ValueError, match="Optimizer step 3: expected a label token in at least one of 2 micro-batches, got none"
    ):
        window_of((0.0, NO), (0.0, NO)).close([torch.zeros(2)], 2, step=3, scaled=False)
    window_of((0.0, NO)).close(
        [torch.ones(2)], 1, step=3, scaled=False
    )  # another process had some: gradients are all's


def test_a_failed_window_does_not_spoil_the_next() -> None:
    window = window_of((float("nan"), YES))
    with pytest.raises(FloatingPointError):
        window.close([torch.ones(1)], 1, step=0, scaled=False)
    window.add_loss(torch.tensor(1.0), YES)
    window.finish_micro_batch()
    assert window.close([torch.ones(1)], 1, step=0, scaled=False).loss_sums.tolist() == [1.0, 1.0]


def test_an_open_window_goes_on_elsewhere_with_its_losses_and_gradients() -> None:
    trained = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(1))}
    trained["a"].grad = torch.tensor([1.0, 2.0])
    state = window_of((2.0, YES)).state_dict(trained)
    trained["a"].grad += 1  # what is saved does not change with it
    other, elsewhere = AccumulationWindow(), {name: nn.Parameter(torch.zeros_like(p)) for name, p in trained.items()}
    other.load_state_dict(state, elsewhere, torch.device("cpu"))
    assert other.micro_batches == 1
    assert elsewhere["a"].grad.tolist() == [1.0, 2.0]
    assert elsewhere["b"].grad is None
    assert other.close([elsewhere["a"].grad], 1, step=0, scaled=False).loss_sums.tolist() == [2.0, 1.0]


def test_between_two_windows_there_is_nothing_to_save() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    window = AccumulationWindow()
    assert window.state_dict({"a": parameter}) is None
    window.load_state_dict(None, {"a": parameter}, torch.device("cpu"))
    assert window.micro_batches == 0
