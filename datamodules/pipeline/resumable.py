"""Training batches that resume in the middle of an epoch, with the next batch and without reading those before it.

Lightning writes `state_dict()` of the training loader into every checkpoint, and hands it back before the first batch.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from grit_lightning.errors import InvalidValueError
from grit_lightning.runs.signals import ignore_signals


class ResumableSampler(DistributedSampler[Any]):
    """A DistributedSampler whose next pass can skip the first rows of its epoch, and whose order can be any.

    Args:
        dataset: Something as long as an epoch.
        num_replicas: Number of processes.
        rank: Number of this process.
        shuffle: As in torch; a given `order` wins.
        seed: Determines torch's order together with the epoch.
        order: Epoch → its row numbers, for all processes; None for torch's order.
        order_name: What the order is called, for the check that a resumed run has the same.
    """

    _rows_to_skip = 0

    def __init__(
        self,
        dataset: Dataset[Any],
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        order: Callable[[int], Sequence[int]] | None = None,
        order_name: str = "shuffled",
    ) -> None:
        """Keep the order; it is asked for when an epoch begins."""
        super().__init__(dataset, num_replicas, rank, shuffle, seed)
        self.order = order
        self.order_name = order_name

    def skip_rows(self, rows: int) -> None:
        """Start the next pass, and only that one, after so many rows of this process."""
        self._rows_to_skip = rows

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the row numbers of this process for the epoch that was set."""
        skipped, self._rows_to_skip = self._rows_to_skip, 0
        if self.order is None:
            return islice(super().__iter__(), skipped, None)
        rows = islice(cycle(self.order(self.epoch)), self.total_size)  # the last share is filled up with the first rows
        return islice(rows, self.rank + skipped * self.num_replicas, None, self.num_replicas)


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
            sampler.skip_rows(self._batches * (self.batch_size or 1))
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
            raise InvalidValueError(
                f"Resuming after {state_dict['batches']} of {state_dict['of']} batches of epoch {state_dict['epoch']}: "
                f"expected the rows of the run that wrote the checkpoint, got others for the rest of that epoch: "
                f"{', '.join(changes)}. Set these back, or resume from a checkpoint written at the end of an epoch."
            )
        self._resumed = dict(state_dict)

    def _order(self) -> dict[str, Any]:
        sampler = self.sampler
        if not isinstance(sampler, ResumableSampler):
            return {}
        return {
            "rows": len(sampler.dataset),  # type: ignore[arg-type]  # torch's Dataset declares no length
            "batch_size": self.batch_size or 1,
            "seed": sampler.seed,
            "processes": sampler.num_replicas,
            "order": sampler.order_name,
        }


class ResumableDataModule(LightningDataModule, ABC):
    """A data module whose training can resume in the middle of an epoch."""

    def __init__(self) -> None:
        """Begin with nothing to resume."""
        super().__init__()
        self._train_loader: ResumableLoader | None = None
        self._resumed: dict[str, Any] | None = None

    @abstractmethod
    def _make_train_loader(self) -> ResumableLoader:
        """Make a loader of the training rows."""

    @property
    @abstractmethod
    def _is_set_up(self) -> bool:
        """Whether there are training rows to load."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches in an order that depends on seed and epoch (Lightning sets the epoch on the sampler).

        A run that is resumed in the middle of an epoch goes on with its next batch.
        """
        loader = self._train_loader = self._make_train_loader()
        resumed, self._resumed = self._resumed, None
        if resumed is not None and self.trainer is not None and self.trainer.ckpt_path is not None:
            loader.load_state_dict(resumed)
        return loader

    def training_batches(self) -> int:
        """Return the training batches of one epoch on this process; after `setup`."""
        return len(self._make_train_loader())

    def state_dict(self) -> dict[str, Any]:
        """Return where the training data are.

        Lightning saves the loader's own state too, but does not give it back where the length of the schedule depends on the
        length of the data (`estimated_stepping_batches`): the loader is then made before the checkpoint is read.
        """
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, when the training data are asked for.

        Raises:
            ValueError: If it was taken in the middle of an epoch whose rows would now come in another order.
        """
        self._resumed = state_dict.get("train")
        if self._resumed is not None and self._is_set_up:
            self._make_train_loader().load_state_dict(self._resumed)  # refuses it now, before the run is touched

    @property
    def _replicas(self) -> dict[str, Any]:
        """Number of processes and of this one. Lightning leaves samplers that know them in place, on one process too."""
        return (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {"num_replicas": 1, "rank": 0}


def loader_options(num_workers: int, seed: int) -> dict[str, Any]:
    """Return what all loaders have in common, as arguments of a DataLoader."""
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": begin_worker,
        "generator": torch.Generator().manual_seed(seed),  # leaves the global random stream to the model
    }


def begin_worker(worker: int) -> None:
    """Prepare a worker process: signals are for the main process, and random numbers as Lightning would seed them."""
    ignore_signals()
    if int(os.environ.get("PL_SEED_WORKERS", "0")):  # Lightning does it for loaders without a function of their own
        pl_worker_init_function(worker)
