"""Rank-space covariances from streamed tokens.

Notation: a layer's rank-space activations a = A x and gradients g = ∂L/∂a are vectors of length r; a *row* is one
token's a or g. Over N valid tokens the Gram matrix is Σ_t row rowᵀ `[r, r]`, and the covariance (uncentred second
moment) is Σ = gram / N. L layers are stacked in front: `[L, r, r]`.

A running estimate keeps two sums, Σ decay^age · gram and Σ decay^age · N, and divides only when it is read (paper
§ 'rank-space covariances'; streaming and EMA: appendix J, M1). Statistics are float32 or better.
"""

import torch
from torch import Tensor

from grit_lightning.functional._common import check_fraction, check_square, per_layer, working


def masked_gram(rows: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum the outer products of the rows that count: Σ_t m_t row_t row_tᵀ.

    Source: paper § 'rank-space covariances'; the mask (padding must not enter) is beyond the paper.

    Args:
        rows: Activations or gradients, one token a row, `[..., r]`, any float dtype.
        mask: True where a token counts, bool `[...]`; None counts every row.

    Returns:
        The Gram matrix, symmetric, `[r, r]`, float32 (float64 for float64 rows).

    Raises:
        ValueError: The mask's shape is not that of the rows without their last dimension.

    Example:
        >>> masked_gram(torch.tensor([[1.0, 2.0], [float("inf"), 0.0]]), torch.tensor([True, False]))
        tensor([[1., 2.],
                [2., 4.]])
    """
    if mask is not None:
        if mask.shape != rows.shape[:-1]:
            raise ValueError(f"mask: expected one bool a row {tuple(rows.shape[:-1])}, got {tuple(mask.shape)}")
        # Filling, not multiplying: 0 · inf would carry a padding cell's overflow into the statistics as NaN.
        rows = rows.masked_fill(~mask.bool().unsqueeze(-1), 0.0)
    flat = working(rows).flatten(0, -2)
    # In place, because an enclosing autocast downcasts `flat.T @ flat` to half precision but never an in-place
    # operation on a float32 tensor; half-precision squares of gradients underflow to zero.
    return flat.new_zeros(flat.shape[-1], flat.shape[-1]).addmm_(flat.T, flat)


def symmetrize(m: Tensor) -> Tensor:
    """Return the symmetric part (m + mᵀ)/2.

    Args:
        m: Square matrices, `[..., r, r]`.

    Returns:
        The same shape and dtype, exactly symmetric.

    Example:
        >>> symmetrize(torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
        tensor([[1., 1.],
                [1., 1.]])
    """
    return (m + m.mT) / 2


def covariance(gram: Tensor, weight: Tensor) -> Tensor:
    """Divide accumulated Gram matrices by the tokens in them: Σ = gram / N.

    Source: paper § 'rank-space covariances'.

    Args:
        gram: Accumulated Gram matrices, `[L, r, r]`.
        weight: Accumulated (possibly decayed) token counts, `[L]`.

    Returns:
        Symmetric covariances `[L, r, r]`; zero where no token has been seen.

    Raises:
        ValueError: The shapes do not match.

    Example:
        >>> covariance(torch.tensor([[[8.0]], [[0.0]]]), torch.tensor([2.0, 0.0])).flatten()
        tensor([4., 0.])
    """
    check_square("gram", gram)
    if weight.shape != gram.shape[:1]:
        raise ValueError(f"weight: expected one count a layer {tuple(gram.shape[:1])}, got {tuple(weight.shape)}")
    seen = weight > 0
    share = torch.where(seen, 1.0 / torch.where(seen, weight, 1.0), 0.0).to(working(gram).dtype)
    return symmetrize(working(gram)) * per_layer(share, gram)


def accumulate(total: Tensor, new: Tensor, decay: float = 1.0) -> Tensor:
    """Fold a new sum into a running one: decay · total + new.

    Apply it with one decay to both the Gram matrices and the token counts. decay = 1 then gives the mean over every
    token seen; decay = β gives the exponential moving average, and because numerator and denominator both start from
    zero their ratio needs no further bias correction (with a constant count it equals Adam's corrected average).

    Source: paper appendix J, M1; the shared-denominator form is beyond the paper.

    Args:
        total: Running sums, any shape.
        new: The newest term, same shape.
        decay: What is kept of the past at each call, in [0, 1].

    Returns:
        The new running sums.

    Raises:
        ValueError: `decay` is outside [0, 1].

    Example:
        >>> accumulate(torch.tensor([4.0]), torch.tensor([1.0]), decay=0.5)
        tensor([3.])
    """
    check_fraction("decay (ema_beta)", decay)
    return decay * total + new


def finite_layers(*grams: Tensor) -> Tensor:
    """Tell which layers hold only finite numbers, so that a broken batch can be left out of a running estimate.

    Source: beyond the paper.

    Args:
        *grams: Stacks of statistics of the same layers, each `[L, ...]`.

    Returns:
        True where every entry of every stack is finite, bool `[L]`.

    Raises:
        ValueError: No stack was given.

    Example:
        >>> finite_layers(torch.tensor([[[1.0]], [[float("nan")]]]))
        tensor([ True, False])
    """
    if not grams:
        raise ValueError("finite_layers: expected at least one stack [L, ...], got none")
    return torch.stack([gram.isfinite().flatten(1).all(dim=1) for gram in grams]).all(dim=0)
