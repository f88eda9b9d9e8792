"""From the settings of a run to what its model will see: all data modules, those of others too."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data.distributed import DistributedSampler
from transformers import PreTrainedTokenizerBase

from grit_lightning.backbones.loading import load_tokenizer
from grit_lightning.cli.settings_only import SettingsCLI
from grit_lightning.datamodules.mixture import MixtureDataModule
from grit_lightning.datamodules.pipeline.batch_rows import rows_of_batches
from grit_lightning.datamodules.pipeline.row_advice import epoch_advice, task_advice
from grit_lightning.datamodules.pipeline.row_report import SeenTask, batches_of_epoch, epoch_report
from grit_lightning.datamodules.pipeline.rows import RowsDataModule
from grit_lightning.datamodules.pipeline.task_table import Split
from grit_lightning.errors import InvalidValueError
from grit_lightning.evaluation.datamodule_protocols import HasMaxLength, HasTokenizer

SEEN_BATCHES = 50
"""Batches that are looked at where a data module has no rows to look at."""
OwnModule = RowsDataModule | MixtureDataModule


def data_report(cli: SettingsCLI, show: int, split: Split) -> dict[str, Any]:
    """Return what a model will see, as plain values; the data are set up for it.

    Args:
        cli: Settings of the run.
        show: Rows to show, token by token.
        split: Where to take them from.

    Raises:
        ValueError: The data module has batches without `input_ids` and `labels`, or no such split.
        Exception: What the data module raises when it is set up.
    """
    with _without_counts(), _remarks() as remarks:
        tasks, epoch = _own(cli, split) if isinstance(cli.datamodule, OwnModule) else _of_others(cli)
        steps = cli.count_steps()
    reports = {name: task.report() for name, task in tasks.items()}
    missing = next((name for name, task in tasks.items() if split not in task.rows), None)
    if show and missing is not None:
        raise InvalidValueError(f"--split: expected one of {', '.join(tasks[missing].rows)}, got {split!r}.")
    tokenizer = next(iter(tasks.values())).tokenizer
    return {
        "data": type(cli.datamodule).__name__,
        "tokenizer": None if tokenizer is None else tokenizer.name_or_path,
        "remarks": remarks,
        "tasks": {
            name: report | {"advice": task_advice(report), "rows": tasks[name].shown(split, show)}
            for name, report in reports.items()
        },
        "epoch": epoch | {"advice": epoch_advice(epoch)},
        "run": {"optimizer_steps": steps},
    }


def _own(cli: SettingsCLI, split: Split) -> tuple[dict[str, SeenTask], dict[str, Any]]:
    """Read the rows of a data module of ours; test rows too, unless they are the validation rows."""
    module = cli.datamodule
    assert isinstance(module, OwnModule)
    module.trainer = cli.trainer
    module.setup("fit")
    named = module.tasks if isinstance(module, MixtureDataModule) else {"": module}
    seen = {}
    for name, task in named.items():
        splits: list[Split] = ["train", "validation"]
        if task.table.test_split != "validation" or split == "test":
            task.setup("test")
            splits.append("test")
        seen[name] = SeenTask.of(task, splits)
    loader = module.train_dataloader()
    processes = cli.trainer.world_size
    count = _limited(len(loader), cli.trainer)
    assert count is not None
    batches = batches_of_epoch(module, loader, processes, count)
    epoch = epoch_report(batches, count, processes, cli.trainer.accumulate_grad_batches)
    return seen, epoch | {"packed": all(task.packing for task in named.values())}


def _of_others(cli: SettingsCLI) -> tuple[dict[str, SeenTask], dict[str, Any]]:
    """Look into the first batches of any data module."""
    module = cli.datamodule
    module.trainer = cli.trainer
    module.prepare_data()
    module.setup("fit")
    loader = module.train_dataloader()
    rows, lengths = rows_of_batches(islice(loader, SEEN_BATCHES))
    if not rows.tokens:
        raise InvalidValueError(f"data: expected training batches with rows, got none from {type(module).__name__}.")
    found = {"train": rows}
    if is_overridden("val_dataloader", module):
        held_out, _ = rows_of_batches(islice(_in_a_row(module.val_dataloader()), SEEN_BATCHES))
        found |= {"validation": held_out} if held_out.tokens else {}
    tokenizer = _tokenizer(cli)
    eos = None if tokenizer is None else tokenizer.eos_token_id
    longest = module.max_length if isinstance(module, HasMaxLength) else None
    task = SeenTask(found, tokenizer, max_length=longest, stop_ids=None if eos is None else [eos])
    processes = cli.trainer.world_size
    shared = (
        1 if isinstance(getattr(loader, "sampler", None), DistributedSampler) else processes
    )  # Lightning shares out
    size = sized_len(loader)
    batches = _limited(None if size is None else math.ceil(size / shared), cli.trainer)
    # Of an epoch only the beginning was looked at, so nothing is said of all its tokens.
    epoch = epoch_report(lengths, batches, processes, cli.trainer.accumulate_grad_batches)
    return {"": task}, epoch | {"rows": None, "tokens": None, "packed": None}


def _tokenizer(cli: SettingsCLI) -> PreTrainedTokenizerBase | None:
    """Return the data module's tokenizer, else that of the backbone; None if the model has none."""
    if isinstance(cli.datamodule, HasTokenizer):
        return cli.datamodule.tokenizer
    settings = cli.config["fit"]
    source = settings.tokenizer or settings.model.init_args.get("backbone")
    return load_tokenizer(source) if isinstance(source, str) else None


def _in_a_row(loaders: Any) -> Iterator[Any]:
    """Go through the batches of one loader, or of several one after another."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    yield from chain.from_iterable(loaders) if isinstance(loaders, list | tuple) else loaders


def _limited(batches: int | None, trainer: Trainer) -> int | None:
    """Return how many of the batches of an epoch a Trainer trains on."""
    limit: int | float = trainer.limit_train_batches
    if batches is None:
        return limit if isinstance(limit, int) else None
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


@contextmanager
def _remarks() -> Iterator[list[str]]:
    """Collect what data modules say of how they read their rows, instead of logging it."""
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno == logging.INFO:
            said.append(record.getMessage())
        return record.levelno > logging.INFO

    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    messages.addFilter(keep)
    try:
        yield said
    finally:
        messages.removeFilter(keep)


@contextmanager
def _without_counts() -> Iterator[None]:
    """Keep back what data modules say of rows that they cut and leave out: the report says it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*: of \d+ rows, ", UserWarning)
        yield
