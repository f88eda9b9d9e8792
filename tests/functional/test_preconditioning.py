"""Oracles: the dense Fisher of a model where its Kronecker form is exact, and gauge covariance."""

import itertools

import pytest
import torch
from torch import Tensor

from grit_lightning import functional as F

R, D_IN, D_OUT = 3, 4, 5


def white_tokens(d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """Every pair of x ∈ {±√d e_i} and δ ∈ {±√m e_j}: E[xxᵀ] = I, E[δδᵀ] = I and x, δ independent, exactly."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    xs = [sign * d_in**0.5 * e for sign in signs for e in torch.eye(d_in, dtype=torch.float64)]
    deltas = [sign * d_out**0.5 * e for sign in signs for e in torch.eye(d_out, dtype=torch.float64)]
    pairs = list(itertools.product(xs, deltas))
    return torch.stack([x for x, _ in pairs]), torch.stack([delta for _, delta in pairs])


def dense_fisher(a: Tensor, b: Tensor, x: Tensor, delta: Tensor, wrt: str) -> Tensor:
    """E[vec(∇) vec(∇)ᵀ] over tokens, the gradients taken one token at a time by autograd."""
    gradients = []
    for token, error in zip(x, delta, strict=True):
        a_, b_ = a.clone().requires_grad_(), b.clone().requires_grad_()
        (error @ (b_ @ (a_ @ token))).backward()
        gradients.append((a_.grad if wrt == "a" else b_.grad).flatten())
    stacked = torch.stack(gradients)
    return stacked.T @ stacked / len(stacked)


def test_preconditioned_gradients_are_dense_fisher_solves_where_inputs_and_errors_are_white(randn):
    damping = 0.1
    a, b = randn(R, D_IN), randn(D_OUT, R)
    x, delta = white_tokens(D_IN, D_OUT)
    level = torch.tensor([damping], dtype=torch.float64)
    a_inverse = F.damped_inverse(F.masked_gram(x @ a.T)[None] / len(x), level).inverse
    g_inverse = F.damped_inverse(F.masked_gram(delta @ b)[None] / len(x), level).inverse
    grad_a, grad_b = randn(R, D_IN), randn(D_OUT, R)
    new_a, new_b = F.precondition(grad_a[None], grad_b[None], a_inverse, g_inverse)
    for wrt, grad, new in (("a", grad_a, new_a), ("b", grad_b, new_b)):
        fisher = dense_fisher(a, b, x, delta, wrt)
        solved = torch.linalg.solve(fisher + damping * torch.eye(len(fisher), dtype=torch.float64), grad.flatten())
        torch.testing.assert_close(new[0], solved.reshape(grad.shape))


def test_both_sides_together_solve_the_kronecker_fisher_of_the_rank_block(randn, random_cov):
    a_cov, g_cov, grad = random_cov(2, R), random_cov(2, R), randn(2, R, R)
    zero = torch.zeros(2, dtype=torch.float64)
    left, right = F.damped_inverse(g_cov, zero).inverse, F.damped_inverse(a_cov, zero).inverse
    new = F.precondition_b(F.precondition_a(grad, left), right)
    for layer in range(2):
        fisher = torch.kron(g_cov[layer], a_cov[layer])  # rows of the gradient are g, columns are a
        torch.testing.assert_close(new[layer].flatten(), torch.linalg.solve(fisher, grad[layer].flatten()))


def first_order_change(a: Tensor, b: Tensor, x: Tensor, delta: Tensor, pairing: str) -> Tensor:
    """d(BA) of one undamped preconditioned SGD step, everything measured at (A, B)."""
    a_cov = F.masked_gram(x @ a.T)[None] / len(x)
    g_cov = F.masked_gram(delta @ b)[None] / len(x)
    grad_a = (delta @ b).T @ x
    grad_b = delta.T @ (x @ a.T)
    zero = torch.zeros(1, dtype=torch.float64)
    inverses = F.damped_inverse(a_cov, zero).inverse, F.damped_inverse(g_cov, zero).inverse
    step_a, step_b = F.precondition(grad_a[None], grad_b[None], *inverses, pairing=pairing)
    return step_b[0] @ a + b @ step_a[0]


@pytest.mark.parametrize(("pairing", "covariant"), [("kfac", True), ("swapped", False)])
def test_only_the_kfac_pairing_steps_alike_in_every_gauge(randn, pairing, covariant):
    a, b, x, delta = randn(R, D_IN), randn(D_OUT, R), randn(20, D_IN), randn(20, D_OUT)
    expected = first_order_change(a, b, x, delta, pairing)
    for _ in range(5):
        t = randn(R, R)
        moved = first_order_change(t @ a, b @ torch.linalg.inv(t), x, delta, pairing)
        gap = (moved - expected).norm() / expected.norm()
        assert gap < 1e-8 if covariant else gap > 1e-2


def test_swapped_exchanges_the_factors(randn, random_cov):
    grad_a, grad_b, a_inverse, g_inverse = randn(2, R, D_IN), randn(2, D_OUT, R), random_cov(2, R), random_cov(2, R)
    for new, expected in zip(
        F.precondition(grad_a, grad_b, a_inverse, g_inverse, pairing=F.Pairing.SWAPPED),
        F.precondition(grad_a, grad_b, g_inverse, a_inverse),
        strict=True,
    ):
        assert torch.equal(new, expected)


def test_unknown_pairing_names_the_choices(randn):
    one = torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match="pairing: expected one of 'kfac', 'swapped', got 'kfc'"):
        F.precondition(one, one, one, one, pairing="kfc")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_keep_their_dtype(random_cov, dtype):
    inverse = random_cov(1, R).float()
    grad_a, grad_b = torch.ones(1, R, D_IN, dtype=dtype), torch.ones(1, D_OUT, R, dtype=dtype)
    assert [new.dtype for new in F.precondition(grad_a, grad_b, inverse, inverse)] == [dtype, dtype]
    assert F.graft(grad_a, grad_a).dtype == F.trust_clip(grad_a, grad_a, 1.0).dtype == dtype


def test_damped_inverse_matches_a_dense_inverse_in_one_attempt(random_cov):
    cov, level = random_cov(4, 6), torch.tensor([0.0, 1e-3, 0.1, 10.0], dtype=torch.float64)
    result = F.damped_inverse(cov, level)
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(result.inverse, torch.linalg.inv(cov + level.reshape(-1, 1, 1) * eye))
    assert result.attempts.tolist() == [1] * 4
    assert not result.failed.any()
    assert torch.equal(result.damping, level)


def test_only_the_layers_that_fail_climb_the_ladder():
    # Smallest eigenvalues −0.5, 1 and −50: λ = 1e-1 needs ×10, ×1 and ×1000 before Σ + λI is positive definite.
    cov = torch.diag_embed(torch.tensor([[1.0, -0.5], [1.0, 1.0], [1.0, -50.0]], dtype=torch.float64))
    result = F.damped_inverse(cov, torch.full((3,), 0.1, dtype=torch.float64))
    assert result.attempts.tolist() == [2, 1, 4]
    torch.testing.assert_close(result.damping, torch.tensor([1.0, 0.1, 100.0], dtype=torch.float64))
    expected = 1.0 / (cov.diagonal(dim1=-2, dim2=-1) + result.damping.unsqueeze(-1))
    torch.testing.assert_close(result.inverse, torch.diag_embed(expected))
    assert not result.failed.any()


def test_a_factor_without_information_leaves_the_gradient_alone(random_cov):
    cov = random_cov(5, 3)
    cov[1, 0, 0], cov[2] = float("nan"), 0.0
    cov[3] = -1e9 * torch.eye(3)
    level = torch.tensor([1e-3, 1e-3, 0.0, 1e-3, float("inf")], dtype=torch.float64)
    result = F.damped_inverse(cov, level)
    assert result.failed.tolist() == [False, True, True, True, True]
    assert torch.equal(result.inverse[1:], torch.eye(3, dtype=torch.float64).expand(4, 3, 3))
    torch.testing.assert_close(result.inverse[0], torch.linalg.inv(cov[0] + 1e-3 * torch.eye(3, dtype=torch.float64)))


def test_a_zero_factor_with_absolute_damping_scales_by_one_over_lambda():
    result = F.damped_inverse(torch.zeros(1, 2, 2), torch.tensor([1e-3]))
    torch.testing.assert_close(result.inverse[0], 1e3 * torch.eye(2))


def test_an_inverse_that_overflows_counts_as_a_failed_attempt():
    result = F.damped_inverse(torch.diag(torch.tensor([1.0, 1e-39]))[None], torch.tensor([1e-45]))
    assert result.inverse.isfinite().all()
    assert result.attempts.item() > 1


def test_inverse_is_symmetric_and_follows_the_dtype(random_cov):
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        inverse = F.damped_inverse(random_cov(2, 4).to(dtype), torch.full((2,), 0.1)).inverse
        assert inverse.dtype == expected
        assert torch.equal(inverse, inverse.mT)


def test_damping_modes_by_hand():
    cov = torch.diag_embed(torch.tensor([[1.0, 3.0], [10.0, 30.0]], dtype=torch.float64))
    tokens, noise = torch.tensor([50, 400]), torch.tensor([0.0, 0.01], dtype=torch.float64)
    expected = {
        "absolute": [0.1, 0.1],
        "relative": [0.2, 2.0],
        "batch_aware": [0.4, 0.1],  # 200 tokens are enough, 50 are a quarter of them
        "quantization_aware": [0.1, 0.3],  # 1% of a mean eigenvalue of 20
    }
    assert set(expected) == {mode.value for mode in F.DampingMode}
    for mode, levels in expected.items():
        came = F.damping_levels(cov, 0.1, mode, tokens=tokens, reference_tokens=200, noise=noise)
        torch.testing.assert_close(came, torch.tensor(levels, dtype=torch.float64))


def test_relative_damping_makes_the_inverse_scale_free(random_cov):
    cov = random_cov(1, 4)
    small, large = (F.damped_inverse(c, F.damping_levels(c, 0.01, "relative")).inverse for c in (cov, 1e6 * cov))
    torch.testing.assert_close(small, 1e6 * large)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": -1e-3}, "kfac_damping"),
        ({"damping": float("nan")}, "kfac_damping"),
        ({"damping": 0.1, "mode": "sometimes"}, "damping_mode: expected one of 'absolute'"),
        ({"damping": 0.1, "mode": "batch_aware"}, "tokens"),
        ({"damping": 0.1, "mode": "quantization_aware"}, "noise"),
    ],
)
def test_wrong_damping_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        F.damping_levels(torch.eye(2)[None], **arguments)


def test_wrong_inverse_arguments_are_refused():
    with pytest.raises(ValueError, match="one level a layer"):
        F.damped_inverse(torch.eye(2)[None], torch.ones(2))
    with pytest.raises(ValueError, match="max_attempts"):
        F.damped_inverse(torch.eye(2)[None], torch.ones(1), max_attempts=0)


def test_grafting_keeps_the_direction_and_takes_the_raw_length(randn):
    new, raw = 1e3 * randn(3, 4, 5), randn(3, 4, 5)
    new[1], raw[2] = 0.0, 0.0
    grafted = F.graft(new, raw)
    assert torch.equal(grafted[1:], torch.zeros(2, 4, 5, dtype=torch.float64))
    torch.testing.assert_close(grafted[0].norm(), raw[0].norm())
    torch.testing.assert_close(grafted[0] / grafted[0].norm(), new[0] / new[0].norm())


def test_trust_clip_shortens_only_what_is_too_long(randn):
    raw = randn(4, 3, 2)
    new = raw * torch.tensor([0.5, 2.0, 5.0, 1.0], dtype=torch.float64).reshape(-1, 1, 1)
    raw[3] = 0.0
    clipped = F.trust_clip(new, raw, limit=2.5)
    torch.testing.assert_close(clipped[:2], new[:2])
    torch.testing.assert_close(clipped[2], 2.5 * raw[2])
    assert torch.equal(clipped[3], torch.zeros(3, 2, dtype=torch.float64))
    assert not F.trust_clip(torch.zeros(1, 2), torch.zeros(1, 2), 1.0).isnan().any()
    with pytest.raises(ValueError, match="limit"):
        F.trust_clip(new, raw, limit=-1.0)


def test_a_result_that_is_not_finite_falls_back_layer_by_layer(randn):
    raw, new = randn(3, 2, 2), randn(3, 2, 2)
    new[0, 0, 0], new[2, 1, 1] = float("nan"), float("-inf")
    used, fell_back = F.finite_or_raw(new, raw)
    assert fell_back.tolist() == [True, False, True]
    assert torch.equal(used, torch.stack([raw[0], new[1], raw[2]]))
