"""Training batches that go on in the middle of an epoch, with the next batch and without reading those before it.

Lightning writes `state_dict()` of the training loader into every checkpoint, and hands it back before the first batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler


class ResumableSampler(DistributedSampler[Any]):
    """A DistributedSampler whose next pass can leave out the first rows of its epoch."""

    _left_out = 0

    def leave_out(self, rows: int) -> None:
        """Start the next pass, and only that one, after so many rows of this process."""
        self._left_out = rows

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the row numbers of this process for the epoch that was set."""
        left_out, self._left_out = self._left_out, 0
        return islice(super().__iter__(), left_out, None)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that counts the batches it has handed out, in any number of worker processes.

    It needs a `ResumableSampler`; with another one (Lightning's `overfit_batches` puts one in place) it is a DataLoader.
    """

    _epoch = 0
    _batches = 0
    _resumed: Mapping[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator, where torch names its own class
        """Iterate over the rest of an epoch that was begun before a checkpoint, or over a whole one.

        As a generator it does nothing before the first batch is asked for. Lightning makes the iterator first and tells
        the sampler the epoch afterwards, and worker processes would by then have fetched rows of the wrong one.
        """
        sampler = self.sampler
        if isinstance(sampler, ResumableSampler):
            resumed, self._resumed = self._resumed, None
            self._epoch, self._batches = sampler.epoch, 0
            if resumed is not None and resumed["epoch"] == sampler.epoch:
                self._batches = resumed["batches"]
            sampler.leave_out(self._batches * (self.batch_size or 1))
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return which batch comes next, and what the order of the rows depends on."""
        if self._resumed is not None:
            return dict(self._resumed)
        return {"epoch": self._epoch, "batches": self._batches, "of": len(self), "order": self._order()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, once its epoch is begun.

        Raises:
            ValueError: If that is in the middle of an epoch whose rows would now come in another order.
        """
        order = self._order()
        if 0 < state_dict["batches"] < state_dict["of"] and state_dict["order"] != order:
            changes = [
                f"{name} {state_dict['order'].get(name)} → {value}"
                for name, value in order.items()
                if state_dict["order"].get(name) != value
            ]
            raise ValueError(
                f"The checkpoint was written after {state_dict['batches']} of {state_dict['of']} batches of epoch "
                f"{state_dict['epoch']}, and the rest of that epoch would now be other rows: {', '.join(changes)}. Set them "
                "back, or resume from a checkpoint written at the end of an epoch."
            )
        self._resumed = dict(state_dict)

    def _order(self) -> dict[str, int]:
        sampler = self.sampler
        if not isinstance(sampler, ResumableSampler):
            return {}
        rows = len(sampler.dataset)  # type: ignore[arg-type]  # torch's Dataset declares no length
        replicas = sampler.num_replicas
        return {"rows": rows, "batch_size": self.batch_size or 1, "seed": sampler.seed, "processes": replicas}
