"""Telemetry against closed forms, SVD and scipy.

Proven here: measures of a spectrum count its directions and ignore its scale; measures of subspaces see the subspace and not
its basis; curvature exposure is the weighted norm, and that of a whole adapter is the same in every gauge; measures of updates
and of windows match torch; wrong arguments are named.
"""

import math

import pytest
import scipy.linalg
import scipy.stats
import torch

from grit_lightning import functional as F

R = 6


@pytest.fixture
def spectra(randn):
    return randn(3, R).square().sort(dim=-1, descending=True).values


@pytest.fixture
def bases(randn):
    return torch.linalg.qr(randn(3, R, R)).Q, torch.linalg.qr(randn(3, R, R)).Q


@pytest.mark.parametrize("measure", [F.participation_ratio, F.stable_rank, lambda v: F.spectral_entropy(v).exp()])
def test_a_flat_spectrum_counts_its_directions(measure):
    values = torch.zeros(R, R, dtype=torch.float64)
    for n in range(R):
        values[n, : n + 1] = 3.7
    torch.testing.assert_close(measure(values), torch.arange(1.0, R + 1, dtype=torch.float64))


@pytest.mark.parametrize("measure", [F.participation_ratio, F.stable_rank, F.spectral_entropy, F.condition_number])
def test_spectral_measures_do_not_depend_on_scale(spectra, measure):
    torch.testing.assert_close(measure(1e-9 * spectra), measure(spectra))


@pytest.mark.parametrize("measure", [F.participation_ratio, F.stable_rank, F.spectral_entropy])
def test_an_empty_spectrum_measures_zero(measure):
    assert measure(torch.zeros(2, R)).tolist() == [0.0, 0.0]


def test_entropy_matches_scipy(spectra):
    expected = torch.tensor([scipy.stats.entropy(row) for row in spectra.numpy()], dtype=torch.float64)
    torch.testing.assert_close(F.spectral_entropy(spectra), expected)


def test_participation_ratio_and_stable_rank_match_matrix_norms(randn):
    matrix = randn(3, R, 9)
    values = torch.linalg.svdvals(matrix)
    norms = {kind: torch.linalg.matrix_norm(matrix, ord=kind) for kind in ("fro", "nuc", 2)}
    torch.testing.assert_close(F.participation_ratio(values), (norms["nuc"] / norms["fro"]).square())
    torch.testing.assert_close(F.stable_rank(values), (norms["fro"] / norms[2]).square())


def test_condition_number_matches_torch_and_knows_damping(random_cov):
    cov = random_cov(2, R)
    values, _ = F.eigenbasis(cov)
    torch.testing.assert_close(F.condition_number(values), torch.linalg.cond(cov))
    damped = cov + 0.1 * torch.eye(R, dtype=torch.float64)
    torch.testing.assert_close(F.condition_number(values, 0.1), torch.linalg.cond(damped))
    assert F.condition_number(torch.tensor([[1.0, 0.0]])).item() == math.inf


def test_effective_rank_and_mass_ratio_read_one_curve():
    values = torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    for eta, rank in ((0.4, 1), (0.69, 2), (0.9, 3), (1.0, 4)):
        assert F.effective_rank(values, eta).tolist() == [rank]
        assert F.mass_ratio(values, rank).item() >= eta - 1e-12
        assert F.mass_ratio(values, rank - 1).item() < eta
    torch.testing.assert_close(F.mass_ratio(values.expand(2, 4), torch.tensor([0, 3])).tolist(), [0.0, 0.9])


def test_drift_is_the_sine_of_the_largest_principal_angle(bases):
    u, v = bases
    for k in (1, 3, 5):
        expected = [
            math.sin(max(scipy.linalg.subspace_angles(a[:, :k].numpy(), b[:, :k].numpy())))
            for a, b in zip(u, v, strict=True)
        ]
        torch.testing.assert_close(F.principal_angle_drift(u, v, k), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.3, math.pi / 2])
def test_drift_of_a_known_rotation(angle):
    rotation = torch.eye(3, dtype=torch.float64)
    rotation[0, 0] = rotation[2, 2] = math.cos(angle)
    rotation[2, 0], rotation[0, 2] = math.sin(angle), -math.sin(angle)
    u = torch.eye(3, dtype=torch.float64)[None]
    assert F.principal_angle_drift(u, rotation[None], 2).item() == pytest.approx(math.sin(angle), rel=1e-6, abs=1e-15)


def test_subspace_measures_see_the_subspace_not_its_basis(bases, randn):
    u, v = bases
    turned = u.clone()
    turned[..., :3] = u[..., :3] @ torch.linalg.qr(randn(3, 3, 3)).Q
    assert F.principal_angle_drift(u, turned, 3).max() < 1e-12
    torch.testing.assert_close(F.alignment(u, turned, 3), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(F.alignment(turned, v, 3), F.alignment(u, v, 3))


def test_alignment_is_the_mean_squared_cosine_of_the_principal_angles(bases):
    u, v = bases
    k = torch.tensor([1, 3, R])
    expected = [
        (torch.linalg.svdvals(a[:, :m].T @ b[:, :m]).square().mean()).item()
        for a, b, m in zip(u, v, k.tolist(), strict=True)
    ]
    torch.testing.assert_close(F.alignment(u, v, k), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(F.alignment(u, v, R), torch.ones(3, dtype=torch.float64))


def test_curvature_exposure_is_the_weighted_norm(randn, random_cov):
    a_cov, g_cov, delta = random_cov(2, R), random_cov(2, R), randn(2, R, R)
    for layer in range(2):
        a_root, g_root = (torch.tensor(scipy.linalg.sqrtm(cov[layer].numpy())) for cov in (a_cov, g_cov))
        expected = (g_root @ delta[layer] @ a_root).square().sum()
        torch.testing.assert_close(F.curvature_exposure(a_cov, g_cov, delta)[layer], expected)
        torch.testing.assert_close(F.curvature_exposure(a_cov, g_cov)[layer], (g_root @ a_root).square().sum())


def test_exposure_of_the_whole_adapter_is_the_same_in_every_gauge(randn, random_cov):
    a_cov, g_cov, t = random_cov(2, R), random_cov(2, R), randn(2, R, R)
    back = torch.linalg.inv(t)
    moved = F.curvature_exposure(t @ a_cov @ t.mT, back.mT @ g_cov @ back)
    torch.testing.assert_close(moved, F.curvature_exposure(a_cov, g_cov))
    torch.testing.assert_close(moved, F.balancing_transform(a_cov, g_cov)[2].square().sum(dim=-1))


def test_projected_curvature_is_the_sum_of_the_kept_eigenvalues(random_cov):
    cov = random_cov(2, R)
    values, vectors = F.eigenbasis(cov)
    torch.testing.assert_close(F.projected_curvature(cov, F.projector(vectors, 2)), values[:, :2].sum(dim=-1))


def test_tail_mass_and_sparsity_count_coordinates(randn):
    delta = randn(2, 40, 50)
    expected = [(abs(layer.numpy()) > 1.5).sum() for layer in delta]
    assert F.tail_mass(delta, 1.5).tolist() == expected
    torch.testing.assert_close(F.sparsity(delta, 1.5), 1 - torch.tensor(expected) / 2000)


def test_direction_jitter_is_one_minus_the_cosine(randn):
    current, previous = randn(3, 4, 5), randn(3, 4, 5)
    cosine = torch.nn.functional.cosine_similarity(current.flatten(1), previous.flatten(1))
    torch.testing.assert_close(F.direction_jitter(current, previous), 1 - cosine)
    torch.testing.assert_close(F.direction_jitter(current, 7 * current), torch.zeros(3, dtype=torch.float64))
    assert F.direction_jitter(current, torch.zeros_like(current)).tolist() == [0.0] * 3


def test_window_statistics_match_torch(randn, random_cov):
    window = torch.stack([random_cov(2, R) for _ in range(5)])
    expected = window.var(dim=0, correction=0).sum(dim=(-2, -1))
    torch.testing.assert_close(F.covariance_variance(window), expected)
    spectra = torch.stack([F.eigenbasis(cov)[0] for cov in window])
    torch.testing.assert_close(
        F.coefficient_of_variation(spectra), spectra.std(dim=0, correction=0) / spectra.mean(dim=0)
    )
    assert F.coefficient_of_variation(torch.zeros(3, 2, 4)).abs().max() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.effective_rank(torch.ones(1, 3), 0.0), "threshold"),
        (lambda: F.mass_ratio(torch.ones(1, 3), 4), "k: expected"),
        (lambda: F.alignment(torch.eye(3)[None], torch.eye(3)[None], 0), "between 1 and"),
        (lambda: F.principal_angle_drift(torch.eye(3)[None], torch.eye(3)[None], 4), "k: expected"),
        (lambda: F.tail_mass(torch.ones(1, 3), -1.0), "t: expected"),
        (lambda: F.stable_rank(torch.ones(3)), r"\[L, r\]"),
        (lambda: F.curvature_exposure(torch.eye(3)[None], torch.eye(2)[None]), "g_cov"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
