"""What B's gradient says of dropped directions: against the definition, in every gauge, and under pure noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grit_lightning import functional as F


def spd(layers: int, r: int, seed: int) -> Tensor:
    root = torch.randn(layers, r, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(r)


def test_the_gains_add_up_to_what_the_dropped_directions_win() -> None:
    """Σ gains · (kept mean) = tr(Σ_a⁻¹M) − tr(Σ_KK⁻¹M_KK), the Schur complement, layer by layer at ranks of their own."""
    a, m, ranks = spd(3, 5, 0), spd(3, 5, 1), torch.tensor([1, 3, 5])
    gain = F.regrowth(a, m, ranks).gain
    for index, k in enumerate(ranks.tolist()):
        whole = torch.trace(torch.linalg.solve(a[index], m[index]))
        kept = torch.trace(torch.linalg.solve(a[index, :k, :k], m[index, :k, :k]))
        assert float(gain[index].sum() * kept / k) == pytest.approx(float(whole - kept), rel=1e-9, abs=1e-12)
        assert bool((gain[index, :k] == 0).all())
        assert bool((gain[index, k:].diff() <= 0).all())


def test_gains_do_not_depend_on_the_gauge_that_leaves_the_kept_space() -> None:
    a, m, k = spd(1, 5, 0), spd(1, 5, 1), torch.tensor([2])
    t = torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t[:, :2, 2:] = 0  # kept rows of A stay combinations of kept rows
    found = F.regrowth(t @ a @ t.mT, t @ m @ t.mT, k).gain
    torch.testing.assert_close(found, F.regrowth(a, m, k).gain, rtol=1e-8, atol=1e-10)


def test_gradients_of_pure_noise_promise_the_kept_mean() -> None:
    a = spd(2, 4, 0)
    gain = F.regrowth(a, 7.0 * a, torch.tensor([1, 2])).gain
    torch.testing.assert_close(gain, (~F.rank_mask(torch.tensor([1, 2]), 4)).double(), rtol=1e-8, atol=1e-8)


def test_the_maps_rotate_dropped_coordinates_only_and_the_best_comes_first() -> None:
    a, k = spd(2, 5, 0), torch.tensor([2, 3])
    best = torch.randn(2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    best = best * ~F.rank_mask(k, 5)
    conditional = a.clone()  # S with the kept block conditioned out, embedded
    for index, rank in enumerate(k.tolist()):
        inverse = torch.linalg.inv(a[index, :rank, :rank])
        conditional[index, rank:, rank:] -= a[index, rank:, :rank] @ inverse @ a[index, :rank, rank:]
    # A gradient along a_D|K·best only, on top of noise: it correlates with a_j as S best.
    signal = (conditional * ~F.rank_mask(k, 5).unsqueeze(-2)) @ best.unsqueeze(-1) * ~F.rank_mask(k, 5).unsqueeze(-1)
    found = F.regrowth(a, a + 50 * signal @ signal.mT, k)
    t = found.maps.a_map
    identity = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    torch.testing.assert_close(t @ t.mT, identity)
    torch.testing.assert_close(found.maps.b_map @ t, identity)
    for index, rank in enumerate(k.tolist()):
        torch.testing.assert_close(t[index, :rank], identity[index, :rank])
        assert float(F.regrowth(a, a + 50 * signal @ signal.mT, k).gain[index, rank]) > 2
        cosine = torch.nn.functional.cosine_similarity(t[index, rank], best[index], dim=0)
        assert abs(float(cosine)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_nothing_observed_is_nothing_to_do_and_scales_do_not_matter(scale: float) -> None:
    a, m, k = spd(1, 3, 0), spd(1, 3, 1), torch.tensor([1])
    found = F.regrowth(a, scale**2 * m, k)
    if scale == 0.0:
        assert bool((found.gain == 0).all())
        torch.testing.assert_close(found.maps.a_map[0], torch.eye(3, dtype=torch.float64))
    else:
        torch.testing.assert_close(found.gain, F.regrowth(a, m, k).gain)


def test_shapes_and_ranks_are_checked() -> None:
    with pytest.raises(ValueError, match="gradient_gram"):
        F.regrowth(torch.eye(3)[None], torch.eye(2)[None], torch.tensor([1]))
    with pytest.raises(ValueError, match="k:"):
        F.regrowth(torch.eye(3)[None], torch.eye(3)[None], torch.tensor([0]))
