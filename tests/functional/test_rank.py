"""Rank rules against hand-made spectra, plain-Python definitions and exhaustive search.

Proven here: the energy and the budget rule are what they are defined as, at their boundaries too and despite rounding;
hysteresis moves a rank only past its band; no evidence is no reason to reduce; over all layers the greedy choice is optimal up
to its last direction; the entropy floor counts directions; mixing drops one direction at its rate and repeats by its seed.
"""

import itertools
import math

import pytest
import torch

from grit_lightning import functional as F

SPECTRUM = torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)  # E = 0.4, 0.7, 0.9, 1.0


@pytest.fixture
def spectra(randn):
    def draw(layers: int, r: int) -> torch.Tensor:
        return randn(layers, r).square().sort(dim=-1, descending=True).values

    return draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("threshold", "rank"), [(0.1, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.71, 3), (0.9, 3), (0.91, 4), (1.0, 4)]
)
def test_energy_rule_on_a_hand_made_spectrum(threshold, rank, dtype):
    assert F.energy_rank(SPECTRUM.to(dtype), threshold).tolist() == [rank]
    assert F.energy_rank(SPECTRUM.to(dtype) * 1e-12, threshold).tolist() == [rank]


def test_energy_rule_matches_its_definition(spectra):
    values = spectra(50, 9)
    for threshold in (0.3, 0.8, 0.95, 0.99):
        expected = [
            next(m for m in range(1, 10) if math.fsum(row[:m]) / math.fsum(row) >= threshold) for row in values.tolist()
        ]
        assert F.energy_rank(values, threshold).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [8, 64])
@pytest.mark.parametrize("rank", [1, 5, 8])
def test_threshold_one_gives_the_numerical_rank(randn, r, rank, dtype):
    rows = randn(3, r, rank).to(dtype)
    values, _ = F.eigenbasis(rows @ rows.mT)  # the eigensolver leaves noise where the zeros belong
    assert F.energy_rank(values, 1.0).tolist() == [rank] * 3


def test_cumulative_energy_is_the_normalised_running_sum(spectra):
    values = spectra(4, 6)
    torch.testing.assert_close(F.cumulative_energy(values), values.cumsum(-1) / values.sum(-1, keepdim=True))
    assert (F.cumulative_energy(values)[:, -1] == 1.0).all()


def test_bounds_apply_after_the_rule():
    assert F.energy_rank(SPECTRUM, 0.1, min_rank=3).tolist() == [3]
    assert F.energy_rank(SPECTRUM, 1.0, max_rank=2).tolist() == [2]
    two_layers = SPECTRUM.expand(2, 4)
    assert F.energy_rank(two_layers, 1.0, max_rank=torch.tensor([2, 4])).tolist() == [2, 4]


def test_no_evidence_is_no_reason_to_reduce():
    zero, cost = torch.zeros(1, 4), torch.ones(1)
    assert F.energy_rank(zero, 0.5).tolist() == [4]
    assert F.energy_rank(zero, 0.5, max_rank=3).tolist() == [3]
    assert F.budget_rank(zero, 1.0).tolist() == [4]
    assert F.entropy_floor_rank(zero).tolist() == [4]
    assert F.global_energy_rank(zero, 0.5, cost).tolist() == [4]
    assert F.global_budget_rank(zero, 1.0, cost).tolist() == [4]
    assert F.energy_rank_with_hysteresis(zero, torch.tensor([2]), 0.5, 0.1).tolist() == [2]


@pytest.mark.parametrize(
    ("current", "answers", "rank"),
    [
        (5, (3, 2, 1), 3),  # even the strict answer is lower
        (5, (6, 4, 3), 5),  # only the strict answer is not lower
        (5, (7, 6, 4), 5),  # the plain answer is higher, the loose one is not
        (5, (8, 7, 6), 7),  # even the loose answer is higher
        (5, (5, 5, 5), 5),
    ],
)
def test_hysteresis_falls_to_the_strict_answer_and_rises_to_the_plain_one(current, answers, rank):
    strict, plain, loose = (torch.tensor([answer]) for answer in answers)
    assert F.rank_with_hysteresis(torch.tensor([current]), strict, plain, loose).tolist() == [rank]


def test_a_band_as_wide_as_the_threshold_holds_even_rank_zero():
    energy = F.cumulative_energy(SPECTRUM)
    assert F.energy_rank_with_hysteresis(energy, torch.tensor([0]), 0.4, 0.4, min_rank=0).tolist() == [0]
    assert F.energy_rank_with_hysteresis(energy, torch.tensor([0]), 0.4, 0.3, min_rank=0).tolist() == [1]


def test_without_a_band_hysteresis_is_the_energy_rule(spectra):
    values = spectra(40, 6)
    current = torch.arange(40) % 6 + 1
    energy = F.cumulative_energy(values)
    for threshold in (0.5, 0.9, 1.0):
        kept = F.energy_rank_with_hysteresis(energy, current, threshold, 0.0)
        assert kept.tolist() == F.energy_rank(values, threshold).tolist()


@pytest.mark.parametrize(
    ("current", "threshold", "rank"),
    [
        (3, 0.88, 3),  # E(3) = 0.90 < τ + ε, E(2) = 0.7: inside the band, stays
        (4, 0.88, 4),  # the rule says 3, but E(3) = 0.90 does not clear 0.93
        (4, 0.84, 3),  # E(3) = 0.90 clears 0.89
        (2, 0.73, 2),  # the rule says 3, but E(2) = 0.70 is above 0.68
        (2, 0.76, 3),  # E(2) = 0.70 is below 0.71
        (1, 0.95, 4),
        (4, 1.0, 4),  # τ + ε is cut at 1
    ],
)
def test_hysteresis_moves_only_past_the_band(current, threshold, rank):
    energy = F.cumulative_energy(SPECTRUM)
    assert F.energy_rank_with_hysteresis(energy, torch.tensor([current]), threshold, 0.05).tolist() == [rank]


def test_a_trembling_curve_does_not_move_the_rank():
    current, plain = torch.tensor([3]), set()
    for wobble in (-0.02, 0.01, 0.02, -0.01):
        energy = torch.tensor([[0.4, 0.7, 0.9 + wobble, 1.0]], dtype=torch.float64)
        plain.add(F.rank_from_energy(energy, 0.9).item())
        current = F.energy_rank_with_hysteresis(energy, current, 0.9, 0.05)
        assert current.tolist() == [3]
    assert plain == {3, 4}


def test_hysteresis_respects_the_bounds_and_counts_from_rank_zero():
    energy = F.cumulative_energy(SPECTRUM).expand(2, 4)
    came = F.energy_rank_with_hysteresis(energy, torch.tensor([0, 4]), 0.4, 0.0, min_rank=2, max_rank=3)
    assert came.tolist() == [2, 2]


def test_budget_rule_matches_its_definition(spectra):
    sigma = spectra(50, 7)
    for budget in (0.0, 1e-3, 0.1, 1.0, 1e3):
        expected = [
            next(k for k in range(8) if 0.5 * math.fsum(s * s for s in row[k:]) <= budget) for row in sigma.tolist()
        ]
        ranks = F.budget_rank(sigma, budget, min_rank=0)
        assert ranks.tolist() == expected
        assert (F.truncation_cost(sigma, ranks) <= budget * (1 + 1e-9)).all()


def test_budget_may_differ_between_layers_and_reaches_its_boundary():
    sigma = torch.tensor([[3.0, 2.0, 1.0]]).expand(3, 3)
    assert F.budget_rank(sigma, torch.tensor([0.5, 2.5, 0.49]), min_rank=0).tolist() == [2, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_budget_that_equals_the_cost_is_enough_despite_rounding(dtype):
    sigma = torch.tensor([[0.75, 0.67, 0.57, 0.51, 0.39, 0.28, 0.18, 0.17]], dtype=dtype)
    for k in range(8):
        budget = 0.5 * math.fsum(s * s for s in (0.75, 0.67, 0.57, 0.51, 0.39, 0.28, 0.18, 0.17)[k:])
        assert F.budget_rank(sigma, budget, min_rank=0).tolist() == [k]
        assert F.global_budget_rank(sigma, budget, torch.tensor([3]), min_rank=0).tolist() == [k]


def test_a_zero_budget_drops_only_directions_that_cost_nothing(randn):
    rows = randn(1, 6, 2)
    a_cov = rows @ rows.mT
    sigma = F.balancing_transform(a_cov, torch.eye(6, dtype=torch.float64)[None])[2].float()
    assert F.budget_rank(sigma, 0.0).tolist() == [2]


def best_allocations(gain: torch.Tensor, cost: list[int], allowed: float) -> int:
    """Fewest parameters over every choice of ranks whose discarded gain is within ``allowed``."""
    layers, r = gain.shape
    choices = itertools.product(range(r + 1), repeat=layers)
    return min(
        sum(c * k for c, k in zip(cost, ks, strict=True))
        for ks in choices
        if sum(gain[layer, k:].sum().item() for layer, k in enumerate(ks)) <= allowed
    )


@pytest.mark.parametrize("rule", ["energy", "budget"])
def test_greedy_is_optimal_at_equal_cost_and_one_direction_off_otherwise(spectra, rule):
    for cost in ([10, 10, 10], [10, 25, 40]):
        for share in (0.02, 0.1, 0.4):
            sigma = spectra(3, 4)
            gain = sigma if rule == "energy" else 0.5 * sigma.square()
            allowed = share * gain.sum().item()
            if rule == "energy":
                ranks = F.global_energy_rank(sigma, 1 - share, torch.tensor(cost), min_rank=0)
            else:
                ranks = F.global_budget_rank(sigma, allowed, torch.tensor(cost), min_rank=0)
            left_out = sum(gain[layer, k:].sum().item() for layer, k in enumerate(ranks.tolist()))
            assert left_out <= allowed * (1 + 1e-9)
            spent, least = (ranks * torch.tensor(cost)).sum().item(), best_allocations(gain, cost, allowed)
            assert least <= spent <= least + (0 if len(set(cost)) == 1 else max(cost) - 1)


def test_global_rules_spend_where_it_is_cheap():
    sigma = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    # Kept in order of σ²/cost: 4/1, 4/2, 1/1, 1/2; a budget of ½ leaves exactly the last one out.
    assert F.global_budget_rank(sigma, 0.5, torch.tensor([1, 2])).tolist() == [2, 1]
    assert F.global_budget_rank(sigma, 0.5, torch.tensor([2, 1])).tolist() == [1, 2]
    assert F.global_energy_rank(sigma.square(), 0.9, torch.tensor([1, 2])).tolist() == [2, 1]


def test_global_rules_respect_bounds_of_each_layer():
    sigma = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 0.1, 0.0, 0.0]])
    cost = torch.tensor([1, 1])
    assert F.global_budget_rank(sigma, 1e-9, cost, max_rank=torch.tensor([3, 2])).tolist() == [3, 2]
    assert F.global_budget_rank(sigma, 1e9, cost, min_rank=2).tolist() == [2, 2]
    assert F.global_budget_rank(sigma, 1e9, cost, min_rank=0).tolist() == [0, 0]
    assert F.global_energy_rank(sigma, 1.0, cost).tolist() == [4, 2]


def test_global_rules_count_what_the_bounds_already_decide():
    cost = torch.tensor([1, 1])
    # The forced second layer leaves ½ to lose, which is all that the first layer's second direction costs.
    assert F.global_budget_rank(torch.tensor([[3.0, 1.0], [0.5, 0.0]]), 0.5, cost, min_rank=1).tolist() == [1, 1]
    # 32 are lost to the first layer's bound whatever is done: the budget of 20 leaves nothing to save on.
    sigma, limit = torch.tensor([[9.0, 8.0], [3.0, 1.0]]), torch.tensor([1, 2])
    assert F.global_budget_rank(sigma, 20.0, cost, max_rank=limit).tolist() == [1, 2]


def test_global_rule_over_one_layer_is_the_layer_rule(spectra):
    sigma, cost = spectra(1, 6), torch.tensor([7])
    for budget in (1e-3, 0.1, 1.0):
        assert torch.equal(F.global_budget_rank(sigma, budget, cost), F.budget_rank(sigma, budget))
    for threshold in (0.5, 0.9, 1.0):
        assert torch.equal(F.global_energy_rank(sigma, threshold, cost), F.energy_rank(sigma, threshold))


@pytest.mark.parametrize("directions", range(1, 9))
def test_entropy_floor_of_a_flat_spectrum_is_its_number_of_directions(directions):
    values = torch.zeros(1, 8)
    values[:, :directions] = 0.3
    assert F.entropy_floor_rank(values).tolist() == [directions]
    assert F.entropy_floor_rank(values.double()).tolist() == [directions]


def test_entropy_floor_rounds_up():
    shares = [0.5, 0.3, 0.2]
    exact = math.exp(-sum(p * math.log(p) for p in shares))  # 2.80
    assert F.entropy_floor_rank(torch.tensor([shares])).tolist() == [math.ceil(exact)]
    assert F.entropy_floor_rank(torch.tensor([shares]), max_rank=2).tolist() == [2]


def test_mixing_drops_one_kept_direction_at_the_given_rate(rng):
    layers, k = 4000, 3
    mask = F.subspace_mixing_mask(torch.full((layers,), k), 5, 0.25, rng)
    dropped = k - mask.sum(dim=-1)
    assert set(dropped.tolist()) == {0, 1}
    assert not mask[:, k:].any()
    # Four standard errors of a binomial share, here and for each direction's third of it.
    assert dropped.double().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / layers) ** 0.5)
    for share in (~mask[:, :k]).double().mean(dim=0).tolist():
        assert share == pytest.approx(0.25 / 3, abs=4 * (0.083 * 0.917 / layers) ** 0.5)


def test_mixing_repeats_with_its_generator_and_never_empties_a_layer():
    k = torch.tensor([0, 1, 2, 4])
    first, second = (F.subspace_mixing_mask(k, 4, 1.0, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.sum(dim=-1).tolist() == [0, 1, 1, 3]
    assert torch.equal(F.subspace_mixing_mask(k, 4, 0.0), F.rank_mask(k, 4))


ONE = torch.ones(1, 4)
COST = torch.ones(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.energy_rank(ONE, 0.0), r"threshold: expected a number in \(0, 1\]"),
        (lambda: F.energy_rank(ONE, 1.1), "threshold"),
        (lambda: F.energy_rank(ONE, 0.9, min_rank=5), "min_rank: expected .* r = 4"),
        (lambda: F.energy_rank(ONE, 0.9, min_rank=3, max_rank=2), "max_rank: expected a rank between 3 and"),
        (lambda: F.energy_rank(ONE, 0.9, max_rank=5), "max_rank"),
        (lambda: F.energy_rank(torch.ones(4), 0.9), r"values: expected one spectrum a layer \[L, r\]"),
        (lambda: F.energy_rank_with_hysteresis(ONE, torch.tensor([2]), 0.9, -0.1), "hysteresis"),
        (lambda: F.energy_rank_with_hysteresis(ONE, torch.tensor([5]), 0.9, 0.1), "current"),
        (lambda: F.budget_rank(ONE, -1.0), "budget"),
        (lambda: F.budget_rank(ONE, 1.0, min_rank=5), "min_rank"),
        (lambda: F.global_energy_rank(ONE, 0.0, COST), "threshold"),
        (lambda: F.global_energy_rank(ONE, 0.5, torch.ones(2)), "cost_per_rank"),
        (lambda: F.global_budget_rank(ONE, -1.0, COST), "budget"),
        (lambda: F.entropy_floor_rank(ONE, min_rank=5), "min_rank"),
        (lambda: F.subspace_mixing_mask(2, 4, 1.5), "probability"),
        (lambda: F.subspace_mixing_mask(5, 4, 0.5), "k: expected"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ranks_are_int64_vectors():
    for ranks in (
        F.energy_rank(ONE, 0.9),
        F.budget_rank(ONE, 1.0),
        F.entropy_floor_rank(ONE),
        F.global_energy_rank(ONE, 0.9, COST),
        F.energy_rank_with_hysteresis(F.cumulative_energy(ONE), torch.tensor([2], dtype=torch.int32), 0.9, 0.0),
    ):
        assert (ranks.dtype, tuple(ranks.shape)) == (torch.int64, (1,))
