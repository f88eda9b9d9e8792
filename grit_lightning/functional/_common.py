"""Argument checks and dtype rules shared by the maths layer."""

import torch
from torch import Tensor


def working(x: Tensor) -> Tensor:
    """Return `x` in the dtype the maths runs in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def norm(x: Tensor) -> Tensor:
    """Frobenius norm of every layer: `[L, ...]` to `[L]`, float32 or better.

    In units of the largest entry, whose square alone would leave float32 beyond 1e19 and vanish below 1e-23.
    """
    flat = working(x).flatten(1)
    peak = torch.linalg.vector_norm(flat, ord=torch.inf, dim=1, keepdim=True)
    unit = torch.where(peak.isfinite() & (peak > 0), peak, 1.0)
    length: Tensor = unit * torch.linalg.vector_norm(flat / unit, dim=1, keepdim=True)
    return length.squeeze(1)


def per_layer(x: Tensor, like: Tensor) -> Tensor:
    """View `x` `[L]` so that it broadcasts over `like` `[L, ...]`."""
    return x.reshape(-1, *[1] * (like.dim() - 1))


def check_square(name: str, cov: Tensor) -> None:
    """Raise ValueError unless `cov` is a stack of square matrices `[L, r, r]`."""
    if cov.dim() != 3 or cov.shape[-1] != cov.shape[-2]:
        raise ValueError(f"{name}: expected a stack of square matrices [L, r, r], got {tuple(cov.shape)}")


def check_spectrum(name: str, values: Tensor) -> None:
    """Raise ValueError unless `values` is a stack of spectra `[L, r]`."""
    if values.dim() != 2:
        raise ValueError(f"{name}: expected one spectrum a layer [L, r], got {tuple(values.shape)}")


def check_fraction(name: str, value: float, *, open_left: bool = False) -> None:
    """Raise ValueError unless `value` lies in [0, 1], or in (0, 1] with `open_left`."""
    if not 0.0 <= value <= 1.0 or (open_left and value == 0.0):
        raise ValueError(f"{name}: expected a number in {'(' if open_left else '['}0, 1], got {value}")


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number ≥ 0."""
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number ≥ 0, got {value}")


def check_rank(name: str, k: int | Tensor, r: int, lowest: int = 0) -> None:
    """Raise ValueError unless lowest ≤ k ≤ r.

    The values of a tensor are looked at only where that costs nothing, on the CPU: on an accelerator the look would
    make the host wait for the device.
    """
    if isinstance(k, Tensor):
        if k.device.type == "cpu" and bool(((k < lowest) | (k > r)).any()):
            raise ValueError(f"{name}: expected ranks between {lowest} and the adapter's r = {r}, got {k.tolist()}")
    elif not lowest <= k <= r:
        raise ValueError(f"{name}: expected a rank between {lowest} and the adapter's r = {r}, got {k}")


def check_rank_limits(min_rank: int, max_rank: int | Tensor | None, r: int) -> int | Tensor:
    """Check 0 ≤ min_rank ≤ max_rank ≤ r and return `max_rank`, or `r` where it is None."""
    check_rank("min_rank", min_rank, r)
    highest = r if max_rank is None else max_rank
    check_rank("max_rank", highest, r, lowest=min_rank)
    return highest
