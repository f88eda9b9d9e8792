"""Natural-gradient preconditioning in rank space.

Notation: ∇A `[L, r, d_in]`, ∇B `[L, d_out, r]`; Σ_a and Σ_g `[L, r, r]` are the second moments of a = A x and
g = ∂L/∂a, and the rank-space Fisher is F ≈ Σ_g ⊗ Σ_a. K-FAC solves with each factor where it belongs:

    ∇A ← (Σ_g + λI)⁻¹ ∇A        ∇B ← ∇B (Σ_a + λI)⁻¹

because ∇A = g xᵀ carries the output gradient g and ∇B = s·δ aᵀ the input a. Everything is batched over the L layers and
runs in float32 or better; gradients return in the dtype they came in.
"""

from enum import Enum
from typing import NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from grit_lightning.functional._common import check_not_negative, check_square, norm, per_layer, working
from grit_lightning.functional.covariance import finite_layers, symmetrize

Option = TypeVar("Option", bound=Enum)


class Pairing(str, Enum):
    """Which factor preconditions which gradient."""

    KFAC = "kfac"
    """∇A by Σ_g, ∇B by Σ_a: the Kronecker solve, covariant under (A, B) → (TA, BT⁻¹)."""
    SWAPPED = "swapped"
    """∇A by Σ_a, ∇B by Σ_g: what the published code does; kept for comparison, not gauge covariant."""


class DampingMode(str, Enum):
    """How λ follows the layer."""

    ABSOLUTE = "absolute"
    """λ is the number given (paper)."""
    RELATIVE = "relative"
    """λ · tr(Σ)/r: a share of the mean eigenvalue (beyond the paper)."""
    BATCH_AWARE = "batch_aware"
    """λ · max(1, reference tokens / tokens): grows as the effective batch shrinks (paper appendix J, M3)."""
    QUANTIZATION_AWARE = "quantization_aware"
    """λ + noise · tr(Σ)/r: eigenvalues below the layer's quantisation noise are not trusted (paper, NF4 safeguards)."""


class DampedInverse(NamedTuple):
    """Inverses of damped factors and how they were reached."""

    inverse: Tensor
    """(Σ + λI)⁻¹, symmetric, `[L, r, r]`; the identity where `failed`."""
    damping: Tensor
    """λ of the last attempt, `[L]`."""
    attempts: Tensor
    """Factorisations tried, int64 `[L]`; 1 where the first λ was enough."""
    failed: Tensor
    """True where no λ served, bool `[L]`."""


def damping_levels(
    cov: Tensor,
    damping: float,
    mode: DampingMode | str = DampingMode.ABSOLUTE,
    *,
    tokens: Tensor | None = None,
    reference_tokens: float | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Choose every layer's λ.

    `absolute` λ; `relative` λ·tr(Σ)/r; `batch_aware` λ·max(1, reference_tokens / tokens); `quantization_aware`
    λ + noise·tr(Σ)/r, where noise = ‖W − Q(W)‖²/‖W‖² is the relative error a quantised backbone puts on the second
    moments, so that eigenvalues under that floor are damped away and noise = 0 is `absolute`.

    Source: paper § 'K-FAC' (absolute), appendix J M3 (batch-aware), NF4 safeguards (quantisation-aware: the paper
    names the idea, the formula is ours); `relative` is beyond the paper.

    Args:
        cov: Factors `[L, r, r]`.
        damping: The base level, ≥ 0; in units of Σ, or a share of its mean eigenvalue for `relative`.
        mode: A `DampingMode` or its value.
        tokens: Tokens per update, `[L]`; for `batch_aware`.
        reference_tokens: Tokens at which the base level is enough; for `batch_aware`.
        noise: Relative squared quantisation error, `[L]`; for `quantization_aware`.

    Returns:
        λ, `[L]`, float32 or better.

    Raises:
        ValueError: Negative damping, an unknown mode, or an argument the mode needs is missing.

    Example:
        >>> damping_levels(torch.diag(torch.tensor([1.0, 3.0]))[None], 0.1, "relative")
        tensor([0.2000])
    """
    check_square("cov", cov)
    check_not_negative("damping (kfac_damping)", damping)
    mode = _option(DampingMode, mode, "damping_mode")
    cov = working(cov)
    mean_eigenvalue = cov.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    base = torch.full_like(mean_eigenvalue, damping)
    if mode is DampingMode.RELATIVE:
        return base * mean_eigenvalue
    if mode is DampingMode.BATCH_AWARE:
        if tokens is None or reference_tokens is None:
            raise ValueError("damping_mode 'batch_aware': expected tokens [L] and reference_tokens, got None")
        return base * (reference_tokens / tokens.to(base.dtype).clamp(min=1.0)).clamp(min=1.0)
    if mode is DampingMode.QUANTIZATION_AWARE:
        if noise is None:
            raise ValueError("damping_mode 'quantization_aware': expected noise [L], got None")
        return base + noise.to(base.dtype) * mean_eigenvalue
    return base


def damped_inverse(cov: Tensor, damping: Tensor, max_attempts: int = 6) -> DampedInverse:
    """Invert Σ + λI by batched Cholesky; where that fails λ climbs ten-fold (λ, 10λ, 100λ, …).

    Only the layers that failed climb. One device-to-host synchronisation an attempt. A factor that no attempt
    inverts (not finite, or all zero with λ = 0) carries no information and must leave the gradient alone: its
    inverse is the identity and `failed` is True.

    Source: paper § 'K-FAC' (damping), A.10 (damping climbs on failure).

    Args:
        cov: Factors `[L, r, r]`.
        damping: First λ of each layer, `[L]`.
        max_attempts: Rungs of the ladder, ≥ 1.

    Returns:
        The inverses with the λ used, the attempts and the failures.

    Raises:
        ValueError: The shapes do not match or `max_attempts` < 1.

    Example:
        >>> damped_inverse(torch.eye(2)[None], torch.tensor([1.0])).inverse[0].diagonal()
        tensor([0.5000, 0.5000])
    """
    check_square("cov", cov)
    if damping.shape != cov.shape[:1]:
        raise ValueError(f"damping: expected one level a layer {tuple(cov.shape[:1])}, got {tuple(damping.shape)}")
    if max_attempts < 1:
        raise ValueError(f"max_attempts: expected at least 1, got {max_attempts}")
    cov = symmetrize(working(cov))
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    level = damping.to(cov.dtype)
    usable = finite_layers(cov) & level.isfinite()
    cov = torch.where(per_layer(usable, cov), cov, eye)
    level = torch.where(usable, level, 0.0)
    inverse, pending = eye.expand_as(cov), usable
    attempts = torch.zeros_like(level, dtype=torch.int64)
    for attempt in range(max_attempts):
        climbed = level * 10 if attempt else level
        level = torch.where(pending, climbed, level)
        attempts = attempts + pending
        factor, info = torch.linalg.cholesky_ex(cov + per_layer(level, cov) * eye)
        solved = (info == 0) & pending
        found = torch.cholesky_inverse(torch.where(per_layer(solved, cov), factor, eye))
        solved = solved & finite_layers(found)  # a pivot of rounding size factorises but inverts to infinity
        inverse = torch.where(per_layer(solved, cov), found, inverse)
        pending = pending & ~solved
        if not bool(pending.any()):
            break
    level = torch.where(usable, level, damping.to(cov.dtype))
    return DampedInverse(symmetrize(inverse), level, attempts, pending | ~usable)


def precondition_a(grad_a: Tensor, left: Tensor) -> Tensor:
    """Precondition ∇A from the left: ∇A ← left ∇A.

    Source: paper § 'K-FAC'; `left` = (Σ_g + λI)⁻¹ under `kfac`.

    Args:
        grad_a: Gradients of the down-projections, `[L, r, d_in]`.
        left: Inverse factors, `[L, r, r]`.

    Returns:
        The preconditioned gradients in the dtype of `grad_a`.

    Example:
        >>> precondition_a(torch.ones(1, 2, 1), torch.diag(torch.tensor([2.0, 3.0]))[None]).flatten()
        tensor([2., 3.])
    """
    return (left @ grad_a.to(left.dtype)).to(grad_a.dtype)


def precondition_b(grad_b: Tensor, right: Tensor) -> Tensor:
    """Precondition ∇B from the right: ∇B ← ∇B right.

    Source: paper § 'K-FAC'; `right` = (Σ_a + λI)⁻¹ under `kfac`.

    Args:
        grad_b: Gradients of the up-projections, `[L, d_out, r]`.
        right: Inverse factors, `[L, r, r]`.

    Returns:
        The preconditioned gradients in the dtype of `grad_b`.

    Example:
        >>> precondition_b(torch.ones(1, 1, 2), torch.diag(torch.tensor([2.0, 3.0]))[None]).flatten()
        tensor([2., 3.])
    """
    return (grad_b.to(right.dtype) @ right).to(grad_b.dtype)


@overload
def precondition(
    grad_a: Tensor, grad_b: Tensor, a_inverse: Tensor, g_inverse: Tensor, pairing: Pairing | str = Pairing.KFAC
) -> tuple[Tensor, Tensor]: ...


@overload
def precondition(
    grad_a: Tensor | None,
    grad_b: Tensor | None,
    a_inverse: Tensor,
    g_inverse: Tensor,
    pairing: Pairing | str = Pairing.KFAC,
) -> tuple[Tensor | None, Tensor | None]: ...


def precondition(
    grad_a: Tensor | None,
    grad_b: Tensor | None,
    a_inverse: Tensor,
    g_inverse: Tensor,
    pairing: Pairing | str = Pairing.KFAC,
) -> tuple[Tensor | None, Tensor | None]:
    """Precondition both gradients: ∇A ← (Σ_g + λI)⁻¹ ∇A and ∇B ← ∇B (Σ_a + λI)⁻¹ (`kfac`), or the factors swapped.

    Source: paper § 'K-FAC' for `kfac`; the published code for `swapped`.

    Args:
        grad_a: `[L, r, d_in]`; None for factors that are frozen.
        grad_b: `[L, d_out, r]`; None for factors that are frozen.
        a_inverse: (Σ_a + λI)⁻¹, `[L, r, r]`.
        g_inverse: (Σ_g + λI)⁻¹, `[L, r, r]`.
        pairing: A `Pairing` or its value.

    Returns:
        The preconditioned (∇A, ∇B), each in its own dtype; None where None was given.

    Raises:
        ValueError: An unknown pairing.

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> [grad.item() for grad in precondition(one, one, a_inverse=2 * one, g_inverse=3 * one)]
        [3.0, 2.0]
    """
    if _option(Pairing, pairing, "pairing") is Pairing.SWAPPED:
        a_inverse, g_inverse = g_inverse, a_inverse
    return (
        None if grad_a is None else precondition_a(grad_a, g_inverse),
        None if grad_b is None else precondition_b(grad_b, a_inverse),
    )


def graft(new: Tensor, raw: Tensor) -> Tensor:
    """Give the preconditioned gradient the raw one's length: new · ‖raw‖/‖new‖ per layer; zero stays zero.

    Source: beyond the paper (norm grafting).

    Args:
        new: Preconditioned gradients `[L, ...]`.
        raw: Raw gradients, same shape.

    Returns:
        The rescaled gradients in the dtype of `new`.

    Example:
        >>> graft(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    length = norm(new)
    scale = torch.where(length > 0, norm(raw) / torch.where(length > 0, length, 1.0), 0.0)
    return (working(new) * per_layer(scale, new)).to(new.dtype)


def trust_clip(new: Tensor, raw: Tensor, limit: float) -> Tensor:
    """Keep the preconditioned gradient within a trust region: ‖new‖ ≤ limit · ‖raw‖ per layer.

    Source: paper § 'K-FAC' (optional trust region).

    Args:
        new: Preconditioned gradients `[L, ...]`.
        raw: Raw gradients, same shape.
        limit: Largest allowed ratio of the norms, ≥ 0.

    Returns:
        `new`, shortened where it was too long, in its dtype.

    Raises:
        ValueError: A negative limit.

    Example:
        >>> trust_clip(torch.tensor([[4.0], [1.0]]), torch.tensor([[1.0], [1.0]]), limit=2.0).flatten()
        tensor([2., 1.])
    """
    check_not_negative("limit (trust region)", limit)
    length, allowed = norm(new), limit * norm(raw)
    scale = torch.where(length > allowed, allowed / torch.where(length > 0, length, 1.0), 1.0)
    return (working(new) * per_layer(scale, new)).to(new.dtype)


def finite_or_raw(new: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Fall back to the raw gradient of every layer whose preconditioned gradient is not finite.

    Source: beyond the paper.

    Args:
        new: Preconditioned gradients `[L, ...]`.
        raw: Raw gradients, same shape.

    Returns:
        The gradients to use, and True where the raw one was taken, bool `[L]`.

    Example:
        >>> finite_or_raw(torch.tensor([[float("nan")], [2.0]]), torch.tensor([[1.0], [1.0]]))
        (tensor([[1.],
                [2.]]), tensor([ True, False]))
    """
    finite = finite_layers(new)
    return torch.where(per_layer(finite, new), new, raw), ~finite


def _option(kind: type[Option], value: Option | str, setting: str) -> Option:
    """Read an enum member from its value; raise ValueError naming the setting and its choices."""
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(repr(member.value) for member in kind)
        raise ValueError(f"{setting}: expected one of {choices}, got {value!r}") from None
