"""The retention map against dense solves, limits and derivatives, all in float64.

Proven here: it is the minimum of the objective, as one r² × r² linear system has it; where μ leads; that the change of
weights is the same in every gauge; that the costs are those of the map and pay for each other at the rate μ; that directions
which nobody has heard leave it finite and right; and that the first-order term is the derivative of a real model's loss.
"""

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from grit_lightning import functional as F

LAYERS, R = 3, 5
MUS = [0.0, 1e-3, 0.1, 1.0, 7.0, 1e3]
EYE = torch.eye(R, dtype=torch.float64).expand(LAYERS, R, R)


@pytest.fixture
def factors(random_cov):
    """S_t, G_t, S_p, G_p of layers of different sizes."""
    return tuple(random_cov(LAYERS, R) * size for size in (3.0, 0.2, 0.5, 2.0))


def objective(factors, x: Tensor, mu) -> Tensor:
    """What the map minimises, `[L]`, written out."""
    task_a, task_g, general_a, general_g = factors
    lost = torch.eye(x.shape[-1], dtype=x.dtype) - x
    task = torch.einsum("lij,lik,lkm,lmj->l", lost, task_g, lost, task_a)
    general = torch.einsum("lij,lik,lkm,lmj->l", x, general_g, x, general_a)
    return 0.5 * (task + torch.as_tensor(mu, dtype=x.dtype) * general)


def dense(factors, mu: float, damping: float = 0.0) -> Tensor:
    """(G_t ⊗ S_t + μ G_p ⊗ S_p) vec X = (G_t ⊗ S_t) vec I, layer by layer."""
    solved = []
    for task_a, task_g, general_a, general_g in zip(*factors, strict=True):
        r = len(task_a)
        eye = torch.eye(r, dtype=torch.float64)
        task_a, task_g = (c + damping * c.trace() / r * eye for c in (task_a, task_g))
        task, general = torch.kron(task_g, task_a), torch.kron(general_g, general_a)
        solved.append(torch.linalg.solve(task + mu * general, task @ eye.flatten()).reshape(r, r))
    return torch.stack(solved)


def without(cov: Tensor, *directions: int) -> Tensor:
    """The covariance with nothing along some of its eigenvectors, ascending, and not a rounding error left of it."""
    values, vectors = torch.linalg.eigh(cov)
    values[:, list(directions)] = 0.0
    return vectors @ torch.diag_embed(values) @ vectors.mT


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.3])
def test_map_is_the_solution_of_the_dense_linear_system(factors, mu, damping):
    torch.testing.assert_close(
        F.retention_map(*factors, mu, damping), dense(factors, mu, damping), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("mu", MUS)
def test_map_is_stationary_and_a_minimum(factors, mu, randn):
    x = F.retention_map(*factors, mu, damping=0.0).requires_grad_()
    value = objective(factors, x, mu)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert float(gradient.abs().max()) < 1e-11 * max(1.0, mu)
    assert (objective(factors, x + 1e-3 * randn(LAYERS, R, R), mu) > value).all()


def test_diagonal_factors_are_filtered_entry_by_entry(randn):
    task_a, task_g, general_a, general_g = diagonals = randn(4, LAYERS, R).square() + 0.1
    x = F.retention_map(*(torch.diag_embed(d) for d in diagonals), mu=2.0, damping=0.0)
    ratio = general_a * general_g / (task_a * task_g)
    torch.testing.assert_close(x, torch.diag_embed(1 / (1 + 2.0 * ratio)))


def test_no_mu_keeps_the_adapter_and_a_great_one_leaves_nothing_of_it(factors):
    torch.testing.assert_close(F.retention_map(*factors, 0.0), EYE)
    torch.testing.assert_close(F.retention_map(*factors, 1e15), torch.zeros_like(EYE), rtol=0, atol=1e-9)


def test_a_great_mu_keeps_what_the_task_needs_of_what_general_text_cannot_tell(factors):
    task_a, task_g, general_a, general_g = factors
    general_a, general_g = without(general_a, 0, 1), without(general_g, 0)
    kept = F.retention_map(task_a, task_g, general_a, general_g, 1e8, damping=0.0)
    for layer in range(LAYERS):
        task = torch.kron(task_g[layer], task_a[layer])
        values, vectors = torch.linalg.eigh(torch.kron(general_g[layer], general_a[layer]))
        deaf = vectors[:, values < 1e-12]
        assert deaf.shape[1] == R * R - (R - 2) * (R - 1)
        needed = task @ torch.eye(R, dtype=torch.float64).flatten()
        expected = deaf @ torch.linalg.solve(deaf.T @ task @ deaf, deaf.T @ needed)
        torch.testing.assert_close(kept[layer].flatten(), expected, rtol=0, atol=1e-5)
    assert float(kept.abs().max()) > 0.1


def test_change_of_weights_is_the_same_in_every_gauge(factors, randn):
    task_a, task_g, general_a, general_g = factors
    a, b, t = randn(LAYERS, R, 9), randn(LAYERS, 7, R), randn(LAYERS, R, R)
    back = torch.linalg.inv(t)
    elsewhere = (t @ task_a @ t.mT, back.mT @ task_g @ back, t @ general_a @ t.mT, back.mT @ general_g @ back)
    x, moved = F.retention_map(*factors, 0.7, damping=0.0), F.retention_map(*elsewhere, 0.7, damping=0.0)
    torch.testing.assert_close((b @ back) @ moved @ (t @ a), b @ x @ a, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mu", MUS)
def test_predicted_costs_are_those_of_the_map(factors, mu):
    task_a, task_g, general_a, general_g = factors
    basis = F.retention_basis(*factors, damping=0.0)
    x = basis.map(mu)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(basis.task_cost(mu), F.projection_cost(task_a, task_g, x), **close)
    torch.testing.assert_close(basis.general_cost(mu), F.projection_cost(general_a, general_g, EYE - x), **close)


def test_task_pays_more_and_general_text_less_as_mu_rises_each_for_the_other_at_the_rate_mu(factors):
    basis = F.retention_basis(*factors)
    mus = torch.logspace(-4, 4, 60, dtype=torch.float64)
    task = torch.stack([basis.task_cost(float(mu)) for mu in mus])
    general = torch.stack([basis.general_cost(float(mu)) for mu in mus])
    assert (task.diff(dim=0) > 0).all()
    assert (general.diff(dim=0) < 0).all()
    mu = torch.full((LAYERS,), 0.3, dtype=torch.float64, requires_grad=True)
    (task_rate,) = torch.autograd.grad(basis.task_cost(mu).sum(), mu)
    (general_rate,) = torch.autograd.grad(basis.general_cost(mu).sum(), mu)
    torch.testing.assert_close(task_rate, -mu.detach() * general_rate)


def test_a_mu_for_each_layer_is_each_layer_with_its_mu(factors):
    mus = torch.tensor([0.0, 0.3, 20.0], dtype=torch.float64)
    basis = F.retention_basis(*factors)
    alone = [F.retention_basis(*(f[layer : layer + 1] for f in factors)) for layer in range(LAYERS)]
    pairs = list(zip(alone, mus.tolist(), strict=True))
    torch.testing.assert_close(basis.map(mus), torch.cat([one.map(mu) for one, mu in pairs]))
    torch.testing.assert_close(F.retention_map(*factors, mus), basis.map(mus))
    torch.testing.assert_close(basis.task_cost(mus), torch.cat([one.task_cost(mu) for one, mu in pairs]))
    torch.testing.assert_close(basis.general_cost(mus), torch.cat([one.general_cost(mu) for one, mu in pairs]))


@pytest.mark.parametrize("silent", [(0,), (1,), (0, 1)])
def test_what_the_task_says_nothing_of_goes(factors, silent):
    said = tuple(torch.zeros_like(f) if i in silent else f for i, f in enumerate(factors))
    torch.testing.assert_close(F.retention_map(*said, 0.5), torch.zeros_like(EYE), rtol=0, atol=1e-8)


@pytest.mark.parametrize("silent", [(2,), (3,), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3)])
def test_what_general_text_says_nothing_of_stays(factors, silent):
    said = tuple(torch.zeros_like(f) if i in silent else f for i, f in enumerate(factors))
    torch.testing.assert_close(F.retention_map(*said, 1e6), EYE)


def test_a_silent_layer_leaves_the_others_alone(factors):
    said = tuple(f.clone() for f in factors)
    for f in said:
        f[1] = 0.0
    x, expected = F.retention_map(*said, 0.5), F.retention_map(*factors, 0.5)
    torch.testing.assert_close(x[1], EYE[1])
    torch.testing.assert_close(x[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("dead", [(0,), (1,), (0, 1), (2, 3), (0, 1, 2, 3)])
def test_directions_without_statistics_are_damped_as_the_dense_system_says(factors, dead):
    said = tuple(without(f, 0, 1) if i in dead else f for i, f in enumerate(factors))
    x = F.retention_map(*said, 0.5, damping=1e-4)
    torch.testing.assert_close(x, dense(said, 0.5, damping=1e-4), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dead", [(0,), (1,), (0, 1), (2, 3)])
def test_directions_without_statistics_need_no_damping_where_the_other_side_hears_them(factors, dead):
    said = tuple(without(f, 0, 1) if i in dead else f for i, f in enumerate(factors))
    torch.testing.assert_close(F.retention_map(*said, 0.5, damping=0.0), dense(said, 0.5), rtol=0, atol=1e-3)
    exactly = tuple(f.clone() for f in factors)
    for i in dead:
        exactly[i][:, -1, :] = exactly[i][:, :, -1] = 0.0
    torch.testing.assert_close(F.retention_map(*exactly, 0.5, damping=0.0), dense(exactly, 0.5), rtol=0, atol=1e-3)


@pytest.mark.parametrize("damping", [0.0, 1e-4])
def test_a_dead_direction_of_the_adapter_stays_as_it_is_and_disturbs_none(factors, damping):
    dead = tuple(f.clone() for f in factors)
    for f in dead:
        f[:, -1, :] = f[:, :, -1] = 0.0  # nothing goes through it, in either pass, on any text
    x = F.retention_map(*dead, 0.5, damping)
    torch.testing.assert_close(x[:, -1], EYE[:, -1])
    torch.testing.assert_close(x[:, :, -1], EYE[:, :, -1])
    level = damping * (R - 1) / R  # of the mean eigenvalue, which is taken over the dead direction too
    torch.testing.assert_close(x[:, :-1, :-1], dense(tuple(f[:, :-1, :-1] for f in dead), 0.5, level))


def test_rounding_and_asymmetry_of_float32_sums_do_no_harm(factors, randn):
    exact = F.retention_map(*factors, 0.5)
    single = tuple(f.float() for f in factors)
    skew = tuple(1e-7 * (n - n.mT).float() for n in (randn(LAYERS, R, R) for _ in factors))
    x = F.retention_map(*(f + n for f, n in zip(single, skew, strict=True)), 0.5)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), exact, rtol=1e-4, atol=1e-5)
    noise = randn(LAYERS, R, R)
    torch.testing.assert_close(F.retention_map(*(f + (noise - noise.mT) for f in factors), 0.5), exact)


def test_eigenvalues_that_rounding_made_negative_count_as_none(factors, randn):
    clean = tuple(without(f, 0) for f in factors)
    values, vectors = zip(*(torch.linalg.eigh(f) for f in factors), strict=True)
    negative = []
    for value, vector in zip(values, vectors, strict=True):
        value[:, 0] = -1e-9
        negative.append(vector @ torch.diag_embed(value) @ vector.mT)
    x = F.retention_map(*negative, 0.5, damping=1e-10)
    torch.testing.assert_close(x, F.retention_map(*clean, 0.5, damping=1e-10), rtol=0, atol=1e-4)
    assert (F.retention_basis(*negative).ratio >= 0).all()


def test_half_precision_statistics_give_a_float32_map(factors):
    assert F.retention_map(*(f.bfloat16() for f in factors), 0.5).dtype == torch.float32
    assert F.retention_map(*factors, 0.5).dtype == torch.float64


@pytest.mark.parametrize("size", [1e-14, 1e14])
def test_units_of_the_loss_do_not_matter(factors, size):
    task_a, task_g, general_a, general_g = factors
    x = F.retention_map(task_a, size * task_g, general_a, size * general_g, 0.5)
    torch.testing.assert_close(x, F.retention_map(*factors, 0.5))
    torch.testing.assert_close(F.retention_map(task_a, size * task_g, general_a, general_g, 0.5 * size), x)


@pytest.fixture
def trained(make_tiny_llama, lora_config, randomize, random_batch):
    """A tiny model's mean loss as a function of its layers' X, `[L, r, r]`, and its B and the gradient of the loss by it."""
    model = randomize(get_peft_model(make_tiny_llama(), lora_config()))
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if hasattr(norm, "variance_epsilon"):  # transformers' own computes in float32, too coarse for a difference
                setattr(module, name, torch.nn.RMSNorm(len(norm.weight), norm.variance_epsilon))
    model.double()
    weights = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    batch = random_batch()

    def loss(maps) -> Tensor:
        edited = {name: b @ x for (name, b), x in zip(weights.items(), maps, strict=True)}
        logits = torch.func.functional_call(model, edited, (), batch).logits  # transformers' own loss is float32
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    loss([torch.eye(4, dtype=torch.float64)] * len(weights)).backward()
    return loss, list(weights.values())


def test_first_order_change_is_the_derivative_of_a_models_loss(trained, randn):
    loss, bs = trained
    cross = torch.stack([b.detach().T @ b.grad for b in bs])
    layers, r = cross.shape[:2]
    eye = torch.eye(r, dtype=torch.float64).expand(layers, r, r).clone()
    maps = eye.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(maps), maps)
    x = eye + randn(layers, r, r)
    predicted = F.first_order_change(cross, x)
    torch.testing.assert_close(predicted, ((x - eye) * gradient).sum(dim=(-2, -1)), rtol=1e-9, atol=1e-12)
    step = 1e-5
    with torch.no_grad():
        difference = (loss(eye + step * (x - eye)) - loss(eye - step * (x - eye))) / (2 * step)
        torch.testing.assert_close(predicted.sum(), difference, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(F.first_order_change(cross, eye), torch.zeros(layers, dtype=torch.float64))
    assert F.first_order_change(cross.float(), x).dtype == torch.float64
    assert F.first_order_change(cross.bfloat16(), x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("mu", [-0.1, float("inf"), float("nan")])
def test_mu_must_be_finite_and_not_negative(factors, mu):
    for refused in (F.retention_basis(*factors).map, F.retention_basis(*factors).task_cost):
        with pytest.raises(ValueError, match=r"^mu:"):
            refused(mu)
    with pytest.raises(ValueError, match=r"^mu:"):
        F.retention_map(*factors, mu)


def test_mus_must_be_one_a_layer(factors):
    basis = F.retention_basis(*factors)
    torch.testing.assert_close(basis.map(torch.tensor(0.5, dtype=torch.float64)), basis.map(0.5))
    for wrong in (torch.ones(LAYERS + 1), torch.ones(1), torch.ones(LAYERS, 1)):
        with pytest.raises(ValueError, match=r"^mu: expected one number per layer"):
            basis.map(wrong)
    for mu in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"^mu: expected finite numbers"):
            F.retention_map(*factors, torch.tensor([1.0, mu, 0.0]))


@pytest.mark.parametrize("damping", [-1e-4, float("inf"), float("nan")])
def test_damping_must_be_finite_and_not_negative(factors, damping):
    with pytest.raises(ValueError, match=r"^damping:"):
        F.retention_map(*factors, 1.0, damping)


@pytest.mark.parametrize("place", range(4))
def test_factors_must_be_square_and_of_one_shape(factors, place):
    name = ("task_a", "task_g", "general_a", "general_g")[place]
    wrong = [factors[place][:, :-1], factors[place][0]]
    if place:
        wrong += [factors[place][:, :-1, :-1], factors[place][:-1]]
    for cov in wrong:
        with pytest.raises(ValueError, match=f"^{name}:"):
            F.retention_map(*(cov if i == place else f for i, f in enumerate(factors)), 1.0)


def test_first_order_change_needs_a_map_for_each_layer(randn):
    with pytest.raises(ValueError, match=r"^x:"):
        F.first_order_change(randn(2, 3, 3), randn(1, 3, 3))
    with pytest.raises(ValueError, match=r"^cross:"):
        F.first_order_change(randn(2, 3, 4), randn(2, 3, 4))
