"""Oracle: gradients and covariances measured afresh at the new factors, for the same tokens."""

import pytest
import torch
from torch import Tensor

from grit_lightning import functional as F

R, D_IN, D_OUT, N, SCALE = 4, 5, 6, 12, 0.5


def measure(a: Tensor, b: Tensor, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∇A, ∇B by autograd through s·B A x for fixed output gradients δ, and Σ_a, Σ_g from its rank-space tensors."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    rank_space = x @ a.mT
    rank_space.retain_grad()
    (delta * (SCALE * rank_space @ b.mT)).sum().backward()
    g = rank_space.grad
    return a.grad, b.grad, (rank_space.mT @ rank_space).detach() / N, g.mT @ g / N


@pytest.fixture
def layer(randn):
    return randn(1, R, D_IN), randn(1, D_OUT, R), randn(1, N, D_IN), randn(1, N, D_OUT)


@pytest.fixture(params=["one_sided", "two_sided", "balanced", "any"])
def maps(request, randn, layer):
    _, _, a_cov, g_cov = measure(*layer)
    return {
        "one_sided": lambda: F.one_sided_maps(a_cov, 2, 0.7),
        "two_sided": lambda: F.two_sided_maps(a_cov, g_cov, 2),
        "balanced": lambda: F.balanced_maps(a_cov, g_cov, 2),
        "any": lambda: F.ReprojectionMaps(randn(1, R, R), randn(1, R, R)),
    }[request.param]()


def test_first_moments_become_the_gradients_at_the_new_factors(layer, maps):
    a, b, x, delta = layer
    grad_a, grad_b, _, _ = measure(a, b, x, delta)
    new_a, new_b, _, _ = measure(maps.a_map @ a, b @ maps.b_map, x, delta)
    carried_a, carried_b = F.carry_first_moment(grad_a, grad_b, maps)
    torch.testing.assert_close(carried_a, new_a)
    torch.testing.assert_close(carried_b, new_b)


def test_covariances_become_those_of_the_new_factors(layer, maps):
    a, b, x, delta = layer
    _, _, a_cov, g_cov = measure(a, b, x, delta)
    _, _, new_a_cov, new_g_cov = measure(maps.a_map @ a, b @ maps.b_map, x, delta)
    carried_a, carried_g = F.carry_covariances(a_cov, g_cov, maps)
    torch.testing.assert_close(carried_a, new_a_cov)
    torch.testing.assert_close(carried_g, new_g_cov)
    assert torch.equal(carried_a, carried_a.mT)


def test_a_dropped_balanced_direction_still_gives_b_a_gradient_and_can_return(layer):
    a, b, x, delta = layer
    _, _, a_cov, g_cov = measure(a, b, x, delta)
    paper, balanced = F.one_sided_maps(a_cov, 2), F.balanced_maps(a_cov, g_cov, 2)
    for maps, comes_back in ((paper, False), (balanced, True)):
        grad_a, grad_b, _, _ = measure(maps.a_map @ a, b @ maps.b_map, x, delta)
        assert grad_a[:, 2:].norm() < 1e-12
        assert (grad_b[..., 2:].norm() > 1e-3) == comes_back


def test_the_preconditioned_step_is_the_same_after_a_full_rank_balance(layer):
    a, b, x, delta = layer
    grad_a, grad_b, a_cov, g_cov = measure(a, b, x, delta)

    def step(a, b, grad_a, grad_b, a_cov, g_cov):
        zero = torch.zeros(1, dtype=torch.float64)
        inverses = F.damped_inverse(a_cov, zero).inverse, F.damped_inverse(g_cov, zero).inverse
        step_a, step_b = F.precondition(grad_a, grad_b, *inverses)
        return step_b @ a + b @ step_a

    maps = F.balanced_maps(a_cov, g_cov, R)
    carried = (*F.carry_first_moment(grad_a, grad_b, maps), *F.carry_covariances(a_cov, g_cov, maps))
    before = step(a, b, grad_a, grad_b, a_cov, g_cov)
    torch.testing.assert_close(step(maps.a_map @ a, b @ maps.b_map, *carried), before)


def test_second_moments_are_exact_for_rescaled_and_permuted_coordinates(randn):
    order, scale = torch.randperm(R), randn(R)
    t = torch.eye(R, dtype=torch.float64)[order] * scale
    maps = F.ReprojectionMaps(t[None], torch.linalg.inv(t)[None])
    grads_a, grads_b = randn(20, 1, R, D_IN), randn(20, 1, D_OUT, R)
    moved = [F.carry_first_moment(grad_a, grad_b, maps) for grad_a, grad_b in zip(grads_a, grads_b, strict=True)]
    carried = F.carry_second_moment(grads_a.square().mean(dim=0), grads_b.square().mean(dim=0), maps)
    for side in (0, 1):
        torch.testing.assert_close(carried[side], torch.stack([m[side] for m in moved]).square().mean(dim=0))


def test_second_moments_are_exact_for_any_map_when_gradient_entries_are_uncorrelated(randn):
    maps = F.ReprojectionMaps(randn(1, R, R), randn(1, R, R))
    deviations_a, deviations_b = randn(1, R, D_IN), randn(1, D_OUT, R)
    # One coordinate at a time: the products of two different coordinates of a gradient are then all zero.
    only = torch.eye(R, dtype=torch.float64)
    moved = [F.carry_first_moment(deviations_a * e[:, None], deviations_b * e, maps) for e in only]
    carried = F.carry_second_moment(deviations_a.square() / R, deviations_b.square() / R, maps)
    for side in (0, 1):
        torch.testing.assert_close(carried[side], torch.stack([m[side] for m in moved]).square().mean(dim=0))


def test_moments_keep_their_dtype(randn):
    maps = F.ReprojectionMaps(randn(1, R, R), randn(1, R, R))
    half = torch.ones(1, R, D_IN, dtype=torch.bfloat16), torch.ones(1, D_OUT, R, dtype=torch.bfloat16)
    assert [m.dtype for m in F.carry_first_moment(*half, maps)] == [torch.bfloat16] * 2
    assert [(v.dtype, bool((v >= 0).all())) for v in F.carry_second_moment(*half, maps)] == [(torch.bfloat16, True)] * 2
