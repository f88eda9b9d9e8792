"""Bytes of the tensors that are alive, and the most that ever were, whether their values exist or not."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _one_kind(tensor: Tensor) -> str:
    return "tensors"


class LiveMemory(TorchDispatchMode):
    """Watches, as a context, every operation of torch, and follows the memory behind its results until it is freed.

    Memory is what storages take: views, and tensors that share memory in another way, count once. What kernels allocate for
    themselves while they run is not seen. Works on any device, and with fake tensors, whose storages have sizes only.

    Args:
        known: Tensors that are there already and are not counted.
        kind_of: Sorts a new storage by the first tensor on it.

    Attributes:
        live: Bytes alive, by kind.
        at_peak: The same at the moment when their sum was largest.
    """

    def __init__(self, known: Iterable[Tensor] = (), kind_of: Callable[[Tensor], str] = _one_kind) -> None:
        """Begin with nothing but what is known."""
        super().__init__()  # type: ignore[no-untyped-call]  # in torch
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._kind_of = kind_of
        self._followed = {tensor.untyped_storage()._cdata for tensor in known}

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return self.at_peak.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and follow what it returns."""
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.layout is torch.strided:
                self.follow(result)
        return results

    def follow(self, tensor: Tensor) -> None:
        """Count the memory behind a tensor until it is freed, unless it is counted or known already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._followed:
            return
        self._followed.add(key)
        kind, size = self._kind_of(tensor), storage.nbytes()
        self.live[kind] += size
        weakref.finalize(storage, self._forget, key, kind, size)
        if self.live.total() > self.peak:
            self.at_peak = self.live.copy()

    def _forget(self, key: int, kind: str, size: int) -> None:
        self._followed.discard(key)
        self.live[kind] -= size
