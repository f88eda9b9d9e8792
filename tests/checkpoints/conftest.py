"""Short runs that are stopped, resumed and compared to the bit; a run without interruption is trained once for all tests.

The run has everything that a resumed one could get wrong: dropout, accumulation, reprojections, rank changes, averages, logs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.backbones import load_tokenizer
from grit_lightning.callbacks import AdapterCheckpoint, RankAdaptation, Reprojection, RunRecord, SpectraLogger
from grit_lightning.datamodules import BoolQDataModule
from grit_lightning.optimizers import EigenbasisAdam
from grit_lightning.runs.metrics_log import JSONLinesLogger

STEPS = 12  # three epochs of 9 micro-batches would be 15: the last window of an epoch is a single micro-batch
OPTIMIZERS = {"adamw": torch.optim.AdamW, "eigenbasis": EigenbasisAdam}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let pass what Lightning says about toy data."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in (
                "ignore:The number of training batches .* is smaller than the logging interval",
                "ignore:The '.*_dataloader' does not have many workers",
            ):
                item.add_marker(pytest.mark.filterwarnings(warning))


class StoppedError(Exception):
    """Ends a run where a signal might have."""


class StopAfterCheckpoint(Checkpoint):
    """Raises when the checkpoint of a step has been written, before Lightning goes on. Checkpoints run last, in order."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._stop(trainer)

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        own = next(callback for callback in trainer.callbacks if isinstance(callback, AdapterCheckpoint))
        if trainer.global_step == own._saved_step == self.step:
            raise StoppedError


class Runs:
    """Trains in folders of their own, and compares.

    Args:
        folder: Where the runs' folders are.
        questions: Folder of the data.
        make_backbone: Keywords of its configuration → a tiny Llama.
        make_adapter: Keywords → a LoRA configuration.
        tokenizer: A folder with a tokenizer.
    """

    stopped = StoppedError

    def __init__(
        self,
        folder: Path,
        questions: Path,
        make_backbone: Callable[..., Any],
        make_adapter: Callable[..., Any],
        tokenizer: Path,
    ) -> None:
        self.folder = folder
        self._questions = questions
        self._make_backbone = make_backbone
        self._make_adapter = make_adapter
        self._tokenizer = tokenizer

    def __call__(
        self,
        name: str,
        *callbacks: pl.Callback,
        resume: Path | None = None,
        optimizer: str = "adamw",
        workers: int = 0,
        backbone: Mapping[str, Any] | None = None,
        module: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        every_n_steps: int = 1,
        **trainer: Any,
    ) -> Path:
        """Train in a folder, from its start or from a checkpoint, and return the folder."""
        torch.set_num_threads(1)
        folder = self.folder / name
        noise = 7 if resume is None else 99  # a resumed process has drawn other random numbers before it is resumed
        pl.seed_everything(noise, verbose=False)
        own = [
            Reprojection("balanced", every_n_steps=4),
            RankAdaptation(every_n_steps=6, threshold=0.9, min_rank=1, energy_ema=0.5, mixing_probability=0.3),
            SpectraLogger(every_n_steps=3),
            RunRecord(str(folder), table="never"),
            AdapterCheckpoint(folder / "checkpoints", every_n_steps=every_n_steps),
        ]
        factory = OPTIMIZERS[optimizer]
        settings: dict[str, Any] = {
            "backbone": self._make_backbone(**(backbone or {})),
            "adapter": self._make_adapter(lora_dropout=0.2),
            "geometry": GeometryConfig(
                kfac_update_freq=2, kfac_min_samples=1, cov_averaging="ema", curvature_penalty=1e-3
            ),
            "optimizer": lambda parameters: factory(parameters, lr=1e-2),
        }
        torch.manual_seed(3)
        lightning_module = GritLitModule(**(settings | dict(module or {})))
        options: dict[str, Any] = {"batch_size": 2, "num_workers": workers, "max_length": 96, "val_limit": 4}
        datamodule = BoolQDataModule(
            load_tokenizer(self._tokenizer), str(self._questions), **(options | dict(data or {}))
        )
        limits: dict[str, Any] = {
            "max_steps": STEPS,
            "limit_val_batches": 0,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
        }
        pl.Trainer(
            accelerator="cpu",
            devices=1,
            default_root_dir=folder,
            logger=JSONLinesLogger(folder),
            callbacks=[*own, *callbacks],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **(limits | trainer),
        ).fit(lightning_module, datamodule=datamodule, ckpt_path=resume)
        return folder

    def stop_and_resume(self, name: str, *steps: int, **settings: Any) -> Path:
        """Stop a run after each of the steps, let it go on, and return its folder."""
        checkpoint = None
        for step in steps:
            self.stop(name, step, resume=checkpoint, **settings)
            checkpoint = self.last(self.folder / name)
            assert torch.load(checkpoint, weights_only=True)["global_step"] == step
        return self(name, resume=checkpoint, **settings)

    def stop(self, name: str, step: int, **settings: Any) -> Path:
        """Train until the checkpoint of a step has been written, and return the folder."""
        with pytest.raises(StoppedError):
            self(name, StopAfterCheckpoint(step), **settings)
        return self.folder / name

    @staticmethod
    def last(folder: Path) -> Path:
        """The last checkpoint of a run."""
        return folder / "checkpoints" / "last.ckpt"

    def content(self, folder: Path) -> dict[str, Any]:
        """All of the last checkpoint but what must differ: the folder's own name, and seconds."""
        saved: dict[str, Any] = torch.load(self.last(folder), weights_only=True)
        del saved["grit_log"]["marks"]  # bytes; the seconds in the lines have no fixed length
        for name in [name for name in saved["loops"]["fit_loop"] if "val_loop" in name]:
            del saved["loops"]["fit_loop"][name]  # Lightning counts the batches of skipped validations
        del saved["callbacks"]["RunRecord"], saved["callbacks"]["AdapterCheckpoint"]["kept"]  # one more after a kill
        return saved

    @staticmethod
    def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The lines of a log, without their time."""
        found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "time"} for line in found]

    def assert_same(self, one: Path, other: Path) -> None:
        """Check that two runs differ in no bit of their last checkpoints and in no line of their logs."""
        assert differing(self.content(one), self.content(other)) == []
        for name in ("metrics.jsonl", "ranks.jsonl", "reprojections.jsonl"):
            assert self.lines(one, name) == self.lines(other, name)


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All values in nested mappings and sequences, by path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from flat(item, f"{name}/{index}")
    else:
        yield name, value


def differing(one: Any, other: Any) -> list[str]:
    """Names of the leaves that are not equal to the bit; NaN equals itself."""
    first, second = dict(flat(one)), dict(flat(other))
    return sorted(first.keys() ^ second.keys()) + [
        name for name in first.keys() & second.keys() if not equal(first[name], second[name])
    ]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return same and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
    return bool(one == other) or (one != one and other != other)


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 training and 4 validation questions: 9 micro-batches of 2."""
    folder = tmp_path_factory.mktemp("questions")
    for split, count in (("train", 18), ("validation", 4)):
        rows = [
            {"question": f"is {n} even", "passage": f"{n} " * (1 + n % 5), "answer": n % 2 == 0} for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def run(
    tmp_path: Path,
    questions: Path,
    make_tiny_llama: Callable[..., Any],
    lora_config: Callable[..., Any],
    tiny_backbone_dir: Path,
) -> Runs:
    """Runs in the test's own folder."""
    return Runs(tmp_path, questions, make_tiny_llama, lora_config, tiny_backbone_dir)


@pytest.fixture(scope="session")
def shared_run(
    tmp_path_factory: pytest.TempPathFactory,
    questions: Path,
    make_tiny_llama: Callable[..., Any],
    lora_config: Callable[..., Any],
    tiny_backbone_dir: Path,
) -> Runs:
    """Runs for several tests. Read their folders, do not write."""
    return Runs(tmp_path_factory.mktemp("shared"), questions, make_tiny_llama, lora_config, tiny_backbone_dir)


@pytest.fixture(scope="session")
def whole(shared_run: Runs) -> Path:
    """The run of all steps with AdamW that nothing has interrupted."""
    return shared_run("whole")
