"""What is in a checkpoint file, how it is written, and which files are kept.

- the adapter, never the backbone, and a format version;
- the newest files, and an older one until `last.ckpt` points elsewhere;
- a write that is cut off anywhere leaves the checkpoint before it, from which the run goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grit_lightning.callbacks import AdapterCheckpoint
from grit_lightning.checkpoints.atomic_io import AtomicCheckpointIO
from grit_lightning.checkpoints.reading import CHECKPOINT_FORMAT


@pytest.fixture(scope="module")
def six_steps(shared_run: Any) -> Path:
    """A run of six steps that nothing has interrupted."""
    folder: Path = shared_run("six steps", max_steps=6)
    return folder


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(value, dict | list | tuple):
        items = value.values() if isinstance(value, dict) else value
        return [tensor for item in items for tensor in tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def test_checkpoints_hold_no_backbone_and_name_their_version(run: Any, make_tiny_llama: Any) -> None:
    folder = run("a", every_n_steps=100, max_steps=2)
    saved = torch.load(run.last(folder), weights_only=True)
    assert saved["grit"]["format_version"] == CHECKPOINT_FORMAT
    held = {value.data_ptr(): value.nbytes for value in tensors(saved)}
    frozen = {tuple(value.shape) for value in make_tiny_llama().state_dict().values()}
    assert all("lora_" in name and tuple(value.shape) not in frozen for name, value in saved["state_dict"].items())
    assert sum(held.values()) < 200_000  # the backbone has 124,000 bytes in its smallest half alone
    assert [path.name for path in (folder / "checkpoints").iterdir() if not path.is_symlink()] == [
        "epoch=0-step=2.ckpt"
    ]


def test_the_newest_are_kept_and_an_older_one_goes_only_when_last_points_elsewhere(
    run: Any, monkeypatch: pytest.MonkeyPatch
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


def cut_write(stopped: type[Exception], monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Half of the bytes of the n-th checkpoint reach the disk, then the process dies."""
    write, calls = torch.save, iter(range(1, 100))

    def save(content: Any, file: Any) -> None:
        write(content, file)
        if next(calls) == number:
            file.truncate(file.tell() // 2)
            raise stopped

    monkeypatch.setattr(torch, "save", save)


def cut_rename(stopped: type[Exception], monkeypatch: pytest.MonkeyPatch, number: int, name: str) -> None:
    """The process dies before the n-th rename to a name with this beginning."""
    replace, calls = os.replace, iter(range(1, 100))

    def rename(source: Any, target: Any) -> None:
        if Path(target).name.startswith(name) and next(calls) == number:
            raise stopped
        replace(source, target)

    monkeypatch.setattr(os, "replace", rename)


@pytest.mark.parametrize(
    ("cut", "usable"),
    [
        (lambda *where: cut_write(*where, 3), 2),
        (lambda *where: cut_rename(*where, 3, "epoch"), 2),
        (lambda *where: cut_rename(*where, 3, "last"), 2),
    ],
    ids=["in the file", "before its name", "before last.ckpt"],
)
@pytest.mark.parametrize("tidy", [True, False], ids=["exception", "killed"])
def test_a_write_cut_off_leaves_the_checkpoint_before_it(
    run: Any,
    six_steps: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut: Callable[..., None],
    usable: int,
    tidy: bool,
) -> None:
    with monkeypatch.context() as patch:
        cut(run.stopped, patch)
        if not tidy:  # a killed process cleans nothing up
            patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        with pytest.raises(run.stopped):
            run("a", max_steps=6)
    checkpoints = run.folder / "a" / "checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == usable
    for path in checkpoints.glob("[!.]*.ckpt"):  # whatever has its final name is whole
        torch.load(path, weights_only=True)
    resumed = run("a", resume=checkpoints / "last.ckpt", max_steps=6)
    run.assert_same(six_steps, resumed)
    assert not list(checkpoints.glob(".*"))


@pytest.mark.parametrize("setting", ["every_n_steps", "keep_last"])
def test_bad_settings_are_named(setting: str) -> None:
    with pytest.raises(ValueError, match=rf"AdapterCheckpoint\.{setting}: expected an integer ≥ 1, got 0"):
        AdapterCheckpoint(**{setting: 0})
