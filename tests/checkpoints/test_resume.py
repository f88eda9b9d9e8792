"""A run that is stopped at any step and resumed is, to the bit, the run that never stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils.data import TensorDataset

from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.backbones.fingerprint import backbone_fingerprint, require_backbone
from grit_lightning.callbacks import AdapterCheckpoint, RankAdaptation, Reprojection, RunRecord, SpectraLogger
from grit_lightning.checkpoints.atomic_io import AtomicCheckpointIO
from grit_lightning.checkpoints.random_state import random_state, restore_random_state
from grit_lightning.datamodules import BoolQDataModule
from grit_lightning.datamodules.pipeline.resumable import ResumableLoader, ResumableSampler
from grit_lightning.optimizers import EigenbasisAdam
from grit_lightning.runs.metrics_log import JSONLinesLogger

STEPS = 12  # three epochs of 9 micro-batches would be 15: the last window of an epoch is a single micro-batch
OPTIMIZERS = {"adamw": torch.optim.AdamW, "eigenbasis": EigenbasisAdam}

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


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


@pytest.fixture(scope="module")
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
    tiny_tokenizer: Any,
) -> Callable[..., Path]:
    """Trains in a folder, from its start or from a checkpoint, and gives the folder."""

    def train(
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
        folder = tmp_path / name
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
            "backbone": make_tiny_llama(**(backbone or {})),
            "adapter": lora_config(lora_dropout=0.2),
            "geometry": GeometryConfig(
                kfac_update_freq=2, kfac_min_samples=1, cov_averaging="ema", curvature_penalty=1e-3
            ),
            "optimizer": lambda parameters: factory(parameters, lr=1e-2),
        }
        torch.manual_seed(3)
        lightning_module = GritLitModule(**(settings | dict(module or {})))
        options: dict[str, Any] = {"batch_size": 2, "num_workers": workers, "max_length": 96, "val_limit": 4}
        datamodule = BoolQDataModule(tiny_tokenizer, str(questions), **(options | dict(data or {})))
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

    train.folder = tmp_path  # type: ignore[attr-defined]
    return train


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def content(folder: Path) -> dict[str, Any]:
    """All of the last checkpoint but what must differ: the folder's own name, and seconds."""
    saved: dict[str, Any] = torch.load(last(folder), weights_only=True)
    del saved["grit_log"]["marks"]  # bytes; the seconds in the lines have no fixed length
    for name in [name for name in saved["loops"]["fit_loop"] if "val_loop" in name]:
        del saved["loops"]["fit_loop"][name]  # Lightning counts the batches of skipped validations
    del saved["callbacks"]["RunRecord"], saved["callbacks"]["AdapterCheckpoint"]["kept"]  # one file more after a kill
    return saved


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
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


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in found]


def assert_same_run(one: Path, other: Path) -> None:
    assert differing(content(one), content(other)) == []
    for name in ("metrics.jsonl", "ranks.jsonl", "reprojections.jsonl"):
        assert lines(one, name) == lines(other, name)


def stop_and_resume(run: Callable[..., Path], name: str, *steps: int, **settings: Any) -> Path:
    """Stops a run after each of the steps and lets it go on."""
    checkpoint = None
    for step in steps:
        with pytest.raises(StoppedError):
            run(name, StopAfterCheckpoint(step), resume=checkpoint, **settings)
        checkpoint = run.folder / name / "checkpoints" / "last.ckpt"  # type: ignore[attr-defined]
        assert torch.load(checkpoint, weights_only=True)["global_step"] == step
    return run(name, resume=checkpoint, **settings)


# Bit for bit.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(run: Callable[..., Path], optimizer: str) -> None:
    whole = run("whole", optimizer=optimizer)
    assert min(content(whole)["grit"]["ranks"].values()) < 4  # what is compared has been through both events
    assert {event["step"] for event in lines(whole, "ranks.jsonl")} == {6, 12}
    assert [event["step"] for event in lines(whole, "reprojections.jsonl")] == [4, 8, 12]
    for step in (1, 3, 4, 5, 6, 10):  # 5 and 10 end an epoch
        assert_same_run(whole, stop_and_resume(run, f"stopped at {step}", step, optimizer=optimizer))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": -1, "max_epochs": 3},  # the length of the schedule then depends on the data
        {"max_steps": -1, "max_epochs": 3, "limit_val_batches": 1.0, "workers": 1},
        {"limit_val_batches": 1.0, "val_check_interval": 4},
        {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None},
        {"limit_train_batches": 7, "log_every_n_steps": 3},
    ],
    ids=["epochs", "epochs, validation, workers", "validation in an epoch", "validation across epochs", "limit"],
)
def test_a_run_stopped_twice_goes_on_bit_for_bit(run: Callable[..., Path], settings: dict[str, Any]) -> None:
    whole = run("whole", **settings)
    for steps in ((5, 7), (2, 4)):
        assert_same_run(whole, stop_and_resume(run, f"stopped at {steps}", *steps, **settings))


def test_a_checkpoint_inside_an_accumulation_window_holds_its_gradients(run: Callable[..., Path]) -> None:
    class SaveInsideWindow(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 2:  # the first of the second window's two micro-batches
                trainer.save_checkpoint(run.folder / "inside.ckpt")
                raise StoppedError

    whole = run("whole")
    with pytest.raises(StoppedError):
        run("stopped", SaveInsideWindow())
    assert_same_run(whole, run("stopped", resume=run.folder / "inside.ckpt"))


def test_random_numbers_go_on_where_they_were() -> None:
    def draw() -> tuple[Any, ...]:
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            np.random.randn(),
            random.random(),
            random.gauss(0, 1),
        )

    draw()
    state = random_state(torch.device("cpu"))
    expected = draw()
    draw()
    restore_random_state(state, torch.device("cpu"))
    assert draw() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_with_the_next_batch(workers: int) -> None:
    def loader() -> ResumableLoader:
        rows = TensorDataset(torch.arange(23))
        sampler = ResumableSampler(rows, num_replicas=1, rank=0, shuffle=True, seed=5)
        return ResumableLoader(rows, 4, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)

    def batches(source: ResumableLoader, epoch: int) -> list[list[int]]:
        iterator = iter(source)  # before the epoch is told, as Lightning does it
        source.sampler.set_epoch(epoch)
        return [batch[0].tolist() for batch in iterator]

    whole = loader()
    expected = [batches(whole, epoch) for epoch in range(2)]
    assert expected[0] != expected[1]
    begun = loader()
    begun.sampler.set_epoch(1)
    iterator = iter(begun)
    for _ in range(2):
        next(iterator)
    resumed = loader()
    resumed.load_state_dict(begun.state_dict())
    assert resumed.state_dict() == begun.state_dict()
    assert len(resumed) == len(begun) == 6
    assert batches(resumed, 1) == expected[1][2:]
    finished = loader()
    finished.load_state_dict(whole.state_dict())  # of a finished epoch: the next one begins at its start
    assert len(batches(finished, 2)) == 6


# What is in a checkpoint, and how it is written.


def test_checkpoints_hold_no_backbone_and_name_their_version(run: Callable[..., Path], make_tiny_llama: Any) -> None:
    folder = run("a", every_n_steps=100, max_steps=2)
    saved = torch.load(last(folder), weights_only=True)
    assert saved["grit"]["format_version"] == 3
    held = {value.data_ptr(): value.nbytes for _, value in flat(saved) if isinstance(value, Tensor)}
    frozen = {tuple(value.shape) for value in make_tiny_llama().state_dict().values()}
    assert all("lora_" in name and tuple(value.shape) not in frozen for name, value in saved["state_dict"].items())
    assert sum(held.values()) < 200_000  # the backbone has 124,000 bytes in its smallest half alone
    assert [path.name for path in (folder / "checkpoints").iterdir() if not path.is_symlink()] == [
        "epoch=0-step=2.ckpt"
    ]


def test_the_newest_are_kept_and_an_older_one_goes_only_when_last_points_elsewhere(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = []
    remove = AtomicCheckpointIO.remove_checkpoint

    def watched(self: AtomicCheckpointIO, path: Any) -> None:
        newest = (Path(path).parent / "last.ckpt").resolve()
        assert newest.is_file()
        assert newest != Path(path).resolve()
        removed.append(Path(path).name)
        remove(self, path)

    monkeypatch.setattr(AtomicCheckpointIO, "remove_checkpoint", watched)
    folder = run("a", every_n_steps=2, max_steps=6)
    assert removed == ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt", "epoch=0-step=5.ckpt"]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "epoch=1-step=6.ckpt"}


def cut_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Half of the bytes of the n-th checkpoint reach the disk, then the process dies."""
    write, calls = torch.save, iter(range(1, 100))

    def save(content: Any, file: Any) -> None:
        write(content, file)
        if next(calls) == number:
            file.truncate(file.tell() // 2)
            raise StoppedError

    monkeypatch.setattr(torch, "save", save)


def cut_rename(monkeypatch: pytest.MonkeyPatch, number: int, name: str) -> None:
    """The process dies before the n-th rename to a name with this beginning."""
    replace, calls = os.replace, iter(range(1, 100))

    def rename(source: Any, target: Any) -> None:
        if Path(target).name.startswith(name) and next(calls) == number:
            raise StoppedError
        replace(source, target)

    monkeypatch.setattr(os, "replace", rename)


@pytest.mark.parametrize(
    ("cut", "usable"),
    [
        (lambda patch: cut_write(patch, 3), 2),
        (lambda patch: cut_rename(patch, 3, "epoch"), 2),
        (lambda patch: cut_rename(patch, 3, "last"), 2),
    ],
    ids=["in the file", "before its name", "before last.ckpt"],
)
@pytest.mark.parametrize("tidy", [True, False], ids=["exception", "killed"])
def test_a_write_cut_off_leaves_the_checkpoint_before_it(
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    cut: Callable[[pytest.MonkeyPatch], None],
    usable: int,
    tidy: bool,
) -> None:
    with monkeypatch.context() as patch:
        cut(patch)
        if not tidy:  # a killed process cleans nothing up
            patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        with pytest.raises(StoppedError):
            run("a", max_steps=6)
    checkpoints = run.folder / "a" / "checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == usable
    for path in checkpoints.glob("[!.]*.ckpt"):  # whatever has its final name is whole
        torch.load(path, weights_only=True)
    resumed = run("a", resume=checkpoints / "last.ckpt", max_steps=6)
    assert_same_run(run("whole", max_steps=6), resumed)
    assert not list(checkpoints.glob(".*"))


# Refusals.


@pytest.fixture
def stopped(run: Callable[..., Path]) -> Path:
    """A run of which 3 of 12 steps are done, in the middle of an epoch."""
    with pytest.raises(StoppedError):
        run("a", StopAfterCheckpoint(3))
    (run.folder / "a" / "summary.json").write_text("{}")
    return run.folder / "a"


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (truncate, {}, "cannot be read as a checkpoint, it is damaged or cut off"),
        (lambda path: path.write_bytes(b""), {}, "cannot be read as a checkpoint, it is damaged or cut off"),
        (lambda path: torch.save([1], path), {}, "is no checkpoint: it holds a list"),
        (lambda path: rewrite(path, lambda saved: saved.pop("grit")), {}, "found no such entry"),
        (
            lambda path: rewrite(path, lambda saved: saved["grit"].update(format_version=1)),
            {},
            "Expected a GRIT checkpoint of format version 3, found version 1",
        ),
        (None, {"backbone": {"num_hidden_layers": 3}}, "another backbone: num_hidden_layers 2 → 3"),
        (None, {"backbone": {"initializer_range": 0.03}}, "of this shape with other weights: 1. of 16 .* differ"),
        (None, {"adapter": {"lora_alpha": 16}}, "another adapter configuration: lora_alpha 8 → 16"),
        (None, {"adapter": {"r": 8}}, "another adapter configuration: r 4 → 8"),
        (None, {"adapter": {"target_modules": ["q_proj"]}}, "target_modules .'q_proj', 'v_proj'. → .'q_proj'."),
        (None, {"data": {"batch_size": 3}}, "after 6 of 9 batches of epoch 0, .* batch_size 2 → 3"),
    ],
)
def test_a_checkpoint_that_does_not_belong_here_is_refused_before_anything_changes(
    run: Callable[..., Path],
    stopped: Path,
    lora_config: Callable[..., Any],
    damage: Callable[[Path], Any] | None,
    settings: dict[str, Any],
    message: str,
) -> None:
    checkpoint = run.folder / "other.ckpt"
    shutil.copy(last(stopped), checkpoint)
    if damage is not None:
        damage(checkpoint)
    if "adapter" in settings:
        settings = {"module": {"adapter": lora_config(lora_dropout=0.2, **settings["adapter"])}}
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        run("a", resume=checkpoint, **settings)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_a_missing_checkpoint_is_named(run: Callable[..., Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt does not exist"):
        run("a", resume=Path("nowhere.ckpt"))


def test_a_backbone_is_known_in_another_dtype_and_not_by_other_weights(make_tiny_llama: Callable[..., Any]) -> None:
    original = backbone_fingerprint(make_tiny_llama())
    require_backbone(original, backbone_fingerprint(make_tiny_llama().bfloat16()))
    require_backbone(backbone_fingerprint(make_tiny_llama().bfloat16()), original)
    tuned = make_tiny_llama()
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight[0, 0] += 0.1
        tuned.lm_head.weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match="other weights"):
        require_backbone(original, backbone_fingerprint(tuned))


@pytest.mark.parametrize("setting", ["every_n_steps", "keep_last"])
def test_bad_settings_are_named(setting: str) -> None:
    with pytest.raises(ValueError, match=rf"AdapterCheckpoint\.{setting}: expected an integer ≥ 1, got 0"):
        AdapterCheckpoint(**{setting: 0})
