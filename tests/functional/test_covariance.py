import pytest
import torch

from grit_lightning import functional as F


def test_gram_is_the_sum_of_outer_products_of_the_rows_that_count(randn):
    rows, mask = randn(3, 5, 4), torch.rand(3, 5) > 0.4
    expected = sum(
        torch.outer(row, row) for row, counts in zip(rows.reshape(-1, 4), mask.flatten(), strict=True) if counts
    )
    torch.testing.assert_close(F.masked_gram(rows, mask), expected)
    torch.testing.assert_close(F.masked_gram(rows), sum(torch.outer(row, row) for row in rows.reshape(-1, 4)))


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_padding_cannot_leak_into_the_gram(randn, poison):
    rows = randn(2, 4, 3)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    clean = F.masked_gram(rows, mask)
    rows[~mask] = poison
    torch.testing.assert_close(F.masked_gram(rows, mask), clean)


def test_padding_to_twice_the_length_changes_nothing(randn):
    rows, mask = randn(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)
    padded = torch.cat([rows, randn(2, 4, 3)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros_like(mask)], dim=1)
    torch.testing.assert_close(F.masked_gram(padded, padded_mask), F.masked_gram(rows, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gram_of_half_precision_rows_is_float32_even_under_autocast(dtype):
    rows = torch.full((8, 2), 1e-5, dtype=dtype)  # the square, 1e-10, is zero in float16
    with torch.autocast("cpu", dtype=dtype):
        gram = F.masked_gram(rows)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram, 8 * rows[:1].float().T @ rows[:1].float())


def test_autocast_does_not_round_the_gram(randn):
    rows = randn(64, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gram = F.masked_gram(rows)
    torch.testing.assert_close(gram, (rows.double().T @ rows.double()).float(), rtol=1e-5, atol=1e-5)


def test_mask_of_the_wrong_shape_is_refused(randn):
    with pytest.raises(ValueError, match=r"mask: expected one bool a row \(2, 4\), got \(4,\)"):
        F.masked_gram(randn(2, 4, 3), torch.ones(4, dtype=torch.bool))


def test_running_mean_equals_the_moment_of_all_tokens_at_once(randn):
    batches = [randn(n, 4) for n in (3, 7, 1)]
    gram, weight = torch.zeros(1, 4, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for batch in batches:
        gram = F.accumulate(gram, F.masked_gram(batch)[None])
        weight = F.accumulate(weight, torch.tensor([float(len(batch))], dtype=torch.float64))
    rows = torch.cat(batches)
    torch.testing.assert_close(F.covariance(gram, weight)[0], torch.einsum("ni,nj->ij", rows, rows) / len(rows))


def test_micro_batches_of_any_split_give_the_same_covariance(randn):
    rows = randn(8, 4)

    def estimate(size: int) -> torch.Tensor:
        gram = torch.zeros(1, 4, 4, dtype=torch.float64)
        for part in rows.split(size):
            gram = F.accumulate(gram, F.masked_gram(part)[None])
        return F.covariance(gram, torch.tensor([8.0], dtype=torch.float64))

    for size in (1, 2, 4):
        torch.testing.assert_close(estimate(size), estimate(8))


def test_decayed_sums_equal_adams_bias_corrected_average_at_constant_count(randn):
    beta, n = 0.9, 5
    gram, weight = torch.zeros(1, 3, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    moment = torch.zeros(3, 3, dtype=torch.float64)
    for step in range(1, 8):
        rows = randn(n, 3)
        gram = F.accumulate(gram, F.masked_gram(rows)[None], decay=beta)
        weight = F.accumulate(weight, torch.tensor([float(n)], dtype=torch.float64), decay=beta)
        moment = beta * moment + (1 - beta) * rows.T @ rows / n
        torch.testing.assert_close(F.covariance(gram, weight)[0], moment / (1 - beta**step))


def test_decay_discounts_the_past_and_never_the_newest():
    total = torch.zeros(1)
    for _ in range(3):
        total = F.accumulate(total, torch.ones(1), decay=0.5)
    assert total.tolist() == [1.75]


def test_decayed_sums_weigh_uneven_batches_by_their_tokens(randn):
    beta, batches = 0.5, [randn(n, 3) for n in (4, 1, 9)]
    gram, weight = torch.zeros(1, 3, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for batch in batches:
        gram = F.accumulate(gram, F.masked_gram(batch)[None], decay=beta)
        weight = F.accumulate(weight, torch.tensor([float(len(batch))], dtype=torch.float64), decay=beta)
    token_weights = torch.cat(
        [torch.full((len(b),), beta ** (2 - i), dtype=torch.float64) for i, b in enumerate(batches)]
    )
    rows = torch.cat(batches)
    expected = torch.einsum("n,ni,nj->ij", token_weights / token_weights.sum(), rows, rows)
    torch.testing.assert_close(F.covariance(gram, weight)[0], expected)


def test_a_layer_without_tokens_has_zero_covariance():
    cov = F.covariance(torch.full((2, 2, 2), float(6)), torch.tensor([3.0, 0.0]))
    assert torch.equal(cov, torch.stack([torch.full((2, 2), 2.0), torch.zeros(2, 2)]))


def test_covariance_is_exactly_symmetric(randn):
    cov = F.covariance(randn(3, 5, 5), torch.ones(3))
    assert torch.equal(cov, cov.mT)
    assert cov.dtype == torch.float64


def test_integer_counts_are_accepted():
    assert F.covariance(torch.ones(1, 2, 2), torch.tensor([4])).dtype == torch.float32


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decay_outside_the_unit_interval_is_refused(decay):
    with pytest.raises(ValueError, match="ema_beta"):
        F.accumulate(torch.zeros(1), torch.zeros(1), decay=decay)


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="weight: expected one count a layer"):
        F.covariance(torch.ones(2, 3, 3), torch.ones(3))
    with pytest.raises(ValueError, match="gram: expected a stack of square matrices"):
        F.covariance(torch.ones(3, 3), torch.ones(3))


def test_finite_layers_looks_at_every_stack():
    first, second = torch.ones(3, 2, 2), torch.ones(3, 2, 2)
    first[0, 1, 1], second[2, 0, 1] = float("inf"), float("nan")
    assert F.finite_layers(first, second).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="at least one"):
        F.finite_layers()
