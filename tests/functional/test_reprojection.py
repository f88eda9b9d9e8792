"""Projections on hand-made spectra, and balanced truncation against weighted low-rank approximation by SVD.

Proven here: the paper's maps move ΔW as its projections do; every mode keeps the first k coordinates of each layer, and its
rule by name makes the maps it is named after; the balancing transform makes both factors one diagonal, in every gauge; a
balanced cut is the cheapest of its rank; wrong arguments are named.
"""

import pytest
import torch
from torch import Tensor

from grit_lightning import functional as F

R = 8
MODES = ["one_sided", "two_sided", "balanced"]


def maps_of(mode: str, a_cov: Tensor, g_cov: Tensor, k, blend: float = 1.0, **options) -> F.ReprojectionMaps:
    if mode == "one_sided":
        return F.one_sided_maps(a_cov, k, blend, **options)
    if mode == "two_sided":
        return F.two_sided_maps(a_cov, g_cov, k, blend, **options)
    return F.balanced_maps(a_cov, g_cov, k, blend)


def top_projector(cov: Tensor, k: int) -> Tensor:
    """Projector on the top-k eigenvectors by SVD, layer by layer: independent of eigenbasis and its ordering."""
    return torch.stack([u[:, :k] @ u[:, :k].T for u in (torch.linalg.svd(c).U for c in cov)])


def root(cov: Tensor) -> Tensor:
    """Symmetric square root."""
    values, vectors = torch.linalg.eigh(cov)
    return vectors @ torch.diag_embed(values.clamp(min=0).sqrt()) @ vectors.mT


def test_eigenbasis_survives_directions_that_have_faded_to_subnormal_numbers(randn):
    # What an average that forgets leaves of dropped directions; LAPACK's solver does not converge on most of these.
    factor, faded, cross = randn(20, 4, 4), randn(20, 4, 4), randn(20, 4, 4)
    cov = torch.zeros(20, R, R, dtype=torch.float64)
    cov[:, :4, :4] = 1e-12 * factor @ factor.mT
    cov[:, 4:, 4:] = 1e-45 * faded @ faded.mT
    cov[:, :4, 4:] = 1e-44 * cross
    cov[:, 4:, :4] = cov[:, :4, 4:].mT
    values, vectors = F.eigenbasis(cov.float())
    expected = torch.linalg.eigvalsh(cov[:, :4, :4].float().double()).flip(-1)
    torch.testing.assert_close(values[:, :4].double(), expected, rtol=1e-4, atol=1e-18)
    assert float(values[:, 4:].max()) < 1e-18
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(R).expand(20, R, R), rtol=0, atol=1e-5)


def test_eigenbasis_is_descending_nonnegative_and_rebuilds_the_matrix(random_cov):
    cov = random_cov(3, 5)
    values, vectors = F.eigenbasis(cov)
    assert (values.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, cov)
    negative, _ = F.eigenbasis(-cov)
    assert torch.equal(negative, torch.zeros_like(negative))


def test_the_basis_of_a_sorted_diagonal_is_the_identity():
    _, vectors = F.eigenbasis(torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None])
    assert torch.equal(vectors[0], torch.eye(3))


def test_projector_of_a_known_basis(randn):
    u = torch.linalg.qr(randn(4, 4)).Q
    cov = u @ torch.diag(torch.tensor([1.0, 7.0, 5.0, 0.1], dtype=torch.float64)) @ u.T
    _, vectors = F.eigenbasis(cov[None])
    expected = torch.outer(u[:, 1], u[:, 1]) + torch.outer(u[:, 2], u[:, 2])
    torch.testing.assert_close(F.projector(vectors, 2)[0], expected)


def test_every_layer_has_its_own_rank(random_cov):
    cov, k = random_cov(3, 5), torch.tensor([0, 2, 5])
    projectors = F.projector(F.eigenbasis(cov)[1], k)
    torch.testing.assert_close(projectors.diagonal(dim1=-2, dim2=-1).sum(-1), k.double())
    torch.testing.assert_close(projectors @ projectors, projectors)


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("keep_dropped", [False, True])
def test_paper_maps_move_delta_w_as_the_papers_projections_do(randn, random_cov, blend, keep_dropped):
    a, b, k = randn(2, R, 6), randn(2, 7, R), 3
    a_cov, g_cov = random_cov(2, R), random_cov(2, R)
    p_a, p_g = top_projector(a_cov, k), top_projector(g_cov, k)
    for mode, p_b in (("one_sided", p_a), ("two_sided", p_g)):
        maps = maps_of(mode, a_cov, g_cov, k, blend, keep_dropped=keep_dropped)
        new_a = (1 - blend) * a + blend * p_a @ a
        new_b = (1 - blend) * b + blend * b @ p_b
        torch.testing.assert_close(b @ maps.b_map @ maps.a_map @ a, new_b @ new_a)


@pytest.mark.parametrize("keep_dropped", [False, True])
def test_layers_with_too_few_gradient_samples_use_the_activation_projector(random_cov, keep_dropped):
    a_cov, g_cov = random_cov(2, R), random_cov(2, R)
    gated = F.two_sided_maps(a_cov, g_cov, 3, 0.5, torch.tensor([True, False]), keep_dropped=keep_dropped)
    two = F.two_sided_maps(a_cov, g_cov, 3, 0.5, keep_dropped=keep_dropped)
    one = F.one_sided_maps(a_cov, 3, 0.5, keep_dropped=keep_dropped)
    assert torch.equal(gated.b_map, torch.stack([two.b_map[0], one.b_map[1]]))
    assert torch.equal(gated.a_map, one.a_map)


@pytest.mark.parametrize("mode", MODES)
def test_rank_k_means_the_first_k_coordinates(random_cov, mode):
    k = torch.tensor([3, R])
    maps = maps_of(mode, random_cov(2, R), random_cov(2, R), k)
    assert torch.equal(maps.b_map[0, :, 3:], torch.zeros(R, R - 3, dtype=torch.float64))
    assert (maps.b_map[0, :, :3].abs().amax(dim=0) > 0).all()
    a_rows_are_kept = mode == "balanced"
    assert (maps.a_map[0, 3:].abs().amax(dim=1) > 0).all() == a_rows_are_kept


def test_keeping_dropped_rows_leaves_them_to_be_measured(random_cov):
    a_cov, g_cov = random_cov(1, R), random_cov(1, R)
    for mode in ("one_sided", "two_sided"):
        maps = maps_of(mode, a_cov, g_cov, 3, keep_dropped=True)
        torch.testing.assert_close(maps.a_map @ maps.a_map.mT, torch.eye(R, dtype=torch.float64)[None])


@pytest.mark.parametrize("mode", MODES)
def test_full_rank_leaves_delta_w_alone(random_cov, mode):
    maps = maps_of(mode, random_cov(3, R), random_cov(3, R), R)
    torch.testing.assert_close(maps.b_map @ maps.a_map, torch.eye(R, dtype=torch.float64).expand(3, R, R))


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_keeps_any_coordinates(random_cov, mode):
    a_cov, g_cov = random_cov(2, R), random_cov(2, R)
    mask = torch.tensor([[True, False, True] + [False] * 5] * 2)
    maps = maps_of(mode, a_cov, g_cov, mask)
    assert torch.equal(maps.b_map.abs().amax(dim=1) > 0, mask)
    by_rank, by_mask = (maps_of(mode, a_cov, g_cov, k) for k in (2, F.rank_mask(torch.tensor([2, 2]), R)))
    assert torch.equal(by_rank.b_map, by_mask.b_map)


def test_balancing_makes_both_factors_the_same_diagonal(random_cov):
    a_cov, g_cov = random_cov(4, R), 1e-4 * random_cov(4, R)
    t, t_inverse, sigma = F.balancing_transform(a_cov, g_cov)
    expected = torch.diag_embed(torch.linalg.svdvals(root(g_cov) @ root(a_cov)))
    torch.testing.assert_close(t @ a_cov @ t.mT, expected)
    torch.testing.assert_close(t_inverse.mT @ g_cov @ t_inverse, expected)
    torch.testing.assert_close(torch.diag_embed(sigma), expected)
    torch.testing.assert_close(t_inverse, torch.linalg.inv(t))


def test_a_balanced_adapter_is_already_balanced(random_cov):
    a_cov, g_cov = random_cov(2, R), random_cov(2, R)
    t, t_inverse, sigma = F.balancing_transform(a_cov, g_cov)
    again, _, sigma_again = F.balancing_transform(t @ a_cov @ t.mT, t_inverse.mT @ g_cov @ t_inverse)
    torch.testing.assert_close(again, torch.eye(R, dtype=torch.float64).expand(2, R, R))
    torch.testing.assert_close(sigma_again, sigma)


def test_sigma_does_not_depend_on_the_gauge_but_the_eigenvalues_do(randn, random_cov):
    a_cov, g_cov, gauge = random_cov(1, R), random_cov(1, R), randn(1, R, R)
    back = torch.linalg.inv(gauge)
    moved_a, moved_g = gauge @ a_cov @ gauge.mT, back.mT @ g_cov @ back
    torch.testing.assert_close(F.balancing_transform(moved_a, moved_g)[2], F.balancing_transform(a_cov, g_cov)[2])
    assert (F.eigenbasis(moved_a)[0] / F.eigenbasis(a_cov)[0]).log().abs().max() > 0.1


def test_volume_preserving_balance_keeps_the_mean_scale(random_cov):
    a_cov, g_cov = random_cov(2, R), 1e-8 * random_cov(2, R)
    t, t_inverse, sigma = F.balancing_transform(a_cov, g_cov, preserve_volume=True)
    torch.testing.assert_close(torch.linalg.det(t).abs(), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(t @ t_inverse, torch.eye(R, dtype=torch.float64).expand(2, R, R))
    moved = t @ a_cov @ t.mT
    scale = moved[:, :1, :1] / sigma[:, :1, None]
    torch.testing.assert_close(moved, scale * torch.diag_embed(sigma))
    torch.testing.assert_close(t_inverse.mT @ g_cov @ t_inverse, torch.diag_embed(sigma) / scale)


def degenerate_pairs(randn, random_cov) -> dict[str, tuple[Tensor, Tensor]]:
    full, zero, thin = random_cov(1, R), torch.zeros(1, R, R, dtype=torch.float64), randn(1, R, 2)
    steep = random_cov(1, R, decay=1e-3)  # eigenvalues over 21 orders of magnitude
    return {
        "no gradient yet (B = 0)": (full, zero),
        "no activation": (zero, full),
        "nothing at all": (zero, zero),
        "rank two": (thin @ thin.mT, full),
        "rank two, both": (thin @ thin.mT, (thin @ thin.mT).flip(-1, -2)),
        "steep": (steep, full),
        "steep, both": (steep, steep.flip(-1, -2)),
        "tiny gradients, steep activations": (steep, 1e-18 * full),
    }


def test_balancing_of_singular_factors_is_finite_exact_and_well_conditioned(randn, random_cov):
    for name, (a_cov, g_cov) in degenerate_pairs(randn, random_cov).items():
        t, t_inverse, sigma = F.balancing_transform(a_cov, g_cov)
        assert t.isfinite().all(), name
        assert (sigma >= 0).all(), name
        assert (torch.linalg.cond(t) < 1.01e3).all(), name
        torch.testing.assert_close(t @ t_inverse, torch.eye(R, dtype=torch.float64)[None], rtol=0, atol=1e-10)


def test_sigma_of_singular_factors_is_not_lifted(randn, random_cov):
    for name, (a_cov, g_cov) in degenerate_pairs(randn, random_cov).items():
        expected = torch.linalg.svdvals(root(g_cov) @ root(a_cov))
        sigma = F.balancing_transform(a_cov, g_cov)[2]
        # A root turns an eigenvalue's rounding error eps·λ into √eps·√λ.
        scale = (a_cov.norm() * g_cov.norm()).sqrt().item()
        torch.testing.assert_close(sigma, expected, rtol=0, atol=1e-7 * scale, msg=name)


def test_balancing_without_gradients_keeps_the_scale_of_a(random_cov):
    a_cov = random_cov(1, R)
    t, _, _ = F.balancing_transform(1e4 * a_cov, torch.zeros_like(a_cov))
    same, _, _ = F.balancing_transform(a_cov, torch.zeros_like(a_cov))
    torch.testing.assert_close(t, same)
    assert 0.1 < torch.linalg.svdvals(t).min() <= torch.linalg.svdvals(t).max() < 10


def test_full_rank_balance_costs_nothing_in_float32(randn, random_cov):
    a_cov, g_cov = random_cov(2, R).float(), (1e-6 * random_cov(2, R)).float()
    maps = F.balanced_maps(a_cov, g_cov, R)
    a, b = randn(2, R, 6).float(), randn(2, 7, R).float()
    assert maps.a_map.dtype == torch.float32
    torch.testing.assert_close((b @ maps.b_map) @ (maps.a_map @ a), b @ a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blend", [0.4, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_predicted_cost_equals_the_measured_quadratic_cost(randn, mode, blend):
    a, g = randn(30, R) @ randn(R, R), randn(40, R) @ randn(R, R)
    a_cov, g_cov = F.masked_gram(a)[None] / len(a), F.masked_gram(g)[None] / len(g)
    maps = maps_of(mode, a_cov, g_cov, 4, blend)
    m = maps.b_map @ maps.a_map
    # Every a with every g: the two are then exactly uncorrelated, as K-FAC assumes.
    first_order = g @ (torch.eye(R, dtype=torch.float64) - m[0]) @ a.T
    torch.testing.assert_close(F.projection_cost(a_cov, g_cov, m)[0], 0.5 * first_order.square().mean())


def test_balanced_cut_costs_the_discarded_sigma(random_cov):
    a_cov, g_cov = random_cov(3, R), random_cov(3, R)
    sigma, k = F.balancing_transform(a_cov, g_cov)[2], torch.tensor([2, 4, R])
    maps = F.balanced_maps(a_cov, g_cov, k)
    cost = F.projection_cost(a_cov, g_cov, maps.b_map @ maps.a_map)
    torch.testing.assert_close(cost, F.truncation_cost(sigma, k))
    torch.testing.assert_close(cost, torch.stack([0.5 * s[m:].square().sum() for s, m in zip(sigma, k, strict=True)]))


def test_balanced_cut_is_the_best_weighted_low_rank_approximation(random_cov):
    """min over rank-k M of ½‖Σ_g^½(I − M)Σ_a^½‖²_F is reached by truncating the SVD of Σ_g^½Σ_a^½ (Eckart–Young)."""
    a_cov, g_cov, k = random_cov(3, R), random_cov(3, R), 4
    u, s, v_t = torch.linalg.svd(root(g_cov) @ root(a_cov))
    best = torch.linalg.inv(root(g_cov)) @ (u[..., :k] * s[:, None, :k]) @ v_t[:, :k] @ torch.linalg.inv(root(a_cov))
    maps = F.balanced_maps(a_cov, g_cov, k)
    torch.testing.assert_close(maps.b_map @ maps.a_map, best)
    torch.testing.assert_close(F.truncation_cost(s, k), 0.5 * s[:, k:].square().sum(dim=-1))


def test_no_rank_k_map_found_by_search_beats_the_balanced_cut(randn, random_cov):
    a_cov, g_cov, k = random_cov(1, R), random_cov(1, R), 4
    maps = F.balanced_maps(a_cov, g_cov, k)
    least = F.projection_cost(a_cov, g_cov, maps.b_map @ maps.a_map)
    many = 2000
    left, right = maps.b_map[..., :k], maps.a_map[:, :k]
    for size in (1e-3, 1e-1, 1.0, 10.0):
        near = (left + size * randn(many, R, k)) @ (right + size * randn(many, k, R))
        costs = F.projection_cost(a_cov.expand(many, R, R), g_cov.expand(many, R, R), near)
        assert (costs >= least * (1 - 1e-12)).all()


def test_balanced_is_cheaper_than_one_sided_is_cheaper_than_two_sided(random_cov):
    layers = 200
    a_cov, g_cov = random_cov(layers, R), random_cov(layers, R)
    cost = {}
    for mode in MODES:
        maps = maps_of(mode, a_cov, g_cov, 4)
        cost[mode] = F.projection_cost(a_cov, g_cov, maps.b_map @ maps.a_map)
    assert (cost["balanced"] < cost["one_sided"]).all()
    assert (cost["balanced"] < cost["two_sided"]).all()
    assert cost["one_sided"].mean() < cost["two_sided"].mean()


def test_layers_do_not_mix(random_cov):
    a_cov, g_cov, k = random_cov(3, R), random_cov(3, R), torch.tensor([1, 4, 7])
    for mode in MODES:
        together = maps_of(mode, a_cov, g_cov, k)
        for layer in range(3):
            here = slice(layer, layer + 1)
            alone = maps_of(mode, a_cov[here], g_cov[here], k[here])
            torch.testing.assert_close(together.b_map[here] @ together.a_map[here], alone.b_map @ alone.a_map)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_maps_follow_the_dtype_at_least_float32(random_cov, dtype):
    a_cov, g_cov = random_cov(1, R).to(dtype), random_cov(1, R).to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for mode in MODES:
        maps = maps_of(mode, a_cov, g_cov, 4)
        assert maps.a_map.dtype == maps.b_map.dtype == expected


@pytest.mark.parametrize("k", [9, -1, torch.tensor([3, 9]), torch.tensor([-1, 3])])
@pytest.mark.parametrize("mode", MODES)
def test_ranks_outside_the_adapter_are_refused(random_cov, mode, k):
    with pytest.raises(ValueError, match=r"k: expected .* the adapter's r = 8"):
        maps_of(mode, random_cov(2, R), random_cov(2, R), k)


@pytest.mark.parametrize("blend", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("mode", MODES)
def test_blend_outside_the_unit_interval_is_refused(random_cov, mode, blend):
    with pytest.raises(ValueError, match=r"blend: expected a number in \[0, 1\]"):
        maps_of(mode, random_cov(1, R), random_cov(1, R), 2, blend)


def test_shapes_that_do_not_match_are_refused(random_cov):
    with pytest.raises(ValueError, match="g_cov: expected the shape of a_cov"):
        F.balancing_transform(random_cov(2, R), random_cov(1, R))
    with pytest.raises(ValueError, match="one rank per layer"):
        F.one_sided_maps(random_cov(2, R), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="mask of kept coordinates"):
        F.one_sided_maps(random_cov(2, R), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="floor"):
        F.balancing_transform(random_cov(1, R), random_cov(1, R), floor=0.0)


@pytest.mark.parametrize("mode", [*F.ReprojectionMode, "two_sided"])
@pytest.mark.parametrize(("blend", "keep_dropped"), [(1.0, True), (1.0, False), (0.4, False)])
def test_a_rule_by_name_makes_the_maps_of_its_mode(random_cov, mode, blend, keep_dropped):
    a_cov, g_cov, kept = random_cov(2, R), random_cov(2, R), F.rank_mask(torch.tensor([3, 5]), R)
    found = F.maps_rule(mode, blend, keep_dropped, preserve_volume=False)(a_cov, g_cov, kept, torch.ones(2).bool())
    options = {} if mode == "balanced" else {"keep_dropped": keep_dropped}
    expected = maps_of(mode, a_cov, g_cov, kept, blend, **options)
    assert torch.equal(found.a_map, expected.a_map)
    assert torch.equal(found.b_map, expected.b_map)


@pytest.mark.parametrize("mode", F.ReprojectionMode)
def test_a_rule_goes_by_the_activations_where_no_gradient_has_been_seen(random_cov, mode):
    a_cov, g_cov, kept = random_cov(2, R), random_cov(2, R), F.rank_mask(torch.tensor([3, 5]), R)
    seen = torch.tensor([True, False])
    found = F.maps_rule(mode)(a_cov, g_cov * seen.view(-1, 1, 1), kept, seen)
    alone = F.one_sided_maps(a_cov, kept, keep_dropped=True)
    assert torch.equal(found.b_map[1], alone.b_map[1])
    assert torch.equal(found.b_map[0], alone.b_map[0]) == (mode == "one_sided")


def test_preserving_the_volume_is_balancings_own_option(random_cov):
    a_cov, g_cov, kept = random_cov(1, R), 1e-4 * random_cov(1, R), F.rank_mask(torch.tensor([R]), R)
    maps = {keeps: F.maps_rule("balanced", 1.0, True, keeps)(a_cov, g_cov, kept, kept[:, 0]) for keeps in (True, False)}
    assert torch.linalg.det(maps[True].a_map).abs().item() == pytest.approx(1.0)
    assert torch.linalg.det(maps[False].a_map).abs().item() < 0.1


def test_an_unknown_mode_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="mode: expected one of one_sided, two_sided, balanced, got 'sideways'"):
        F.maps_rule("sideways")
