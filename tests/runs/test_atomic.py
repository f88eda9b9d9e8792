"""Atomic writes: whatever moment a process ends at, what was there before or what is new is whole.

- A file: cut off while it is written, or before its name, by an exception or by a kill. It is on disk before it has its name.
- A link: cut off before its name; a copy where links are not allowed.
- A folder: with its parents or without any of them; never over something else.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from grit_lightning.runs.atomic import (
    atomic_folder,
    point_to,
    replaced_folder,
    require_free_folder,
    require_writable,
    write_file,
    write_json,
    write_text,
)


class CutOffError(Exception):
    """Ends a write where a kill might have."""


def cut_off(*_: Any) -> None:
    raise CutOffError


def write_half(file: BinaryIO) -> None:
    file.write(b"ne")
    raise CutOffError


def write_all(file: BinaryIO) -> None:
    file.write(b"new")


@pytest.mark.parametrize("old", ["old", None], ids=["over a file", "new"])
@pytest.mark.parametrize("write", [write_half, write_all], ids=["in the file", "before its name"])
@pytest.mark.parametrize("killed", [False, True], ids=["exception", "killed"])
def test_a_write_cut_off_leaves_what_was_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: str | None,
    write: Callable[[BinaryIO], None],
    killed: bool,
) -> None:
    path = tmp_path / "summary.json"
    if old is not None:
        write_text(path, old)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut_off)
        if killed:  # nothing is tidied up
            patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(CutOffError):
            write_file(path, write)
    assert (path.read_text() if path.exists() else None) == old
    left = [entry.name for entry in tmp_path.iterdir() if entry != path]
    assert left == ([".summary.json.unfinished"] if killed else [])
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_the_content_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, int]] = []
    sync, rename = os.fsync, os.replace

    def watched_sync(descriptor: int) -> None:
        events.append(("sync", os.fstat(descriptor).st_ino))
        sync(descriptor)

    def watched_rename(source: Path, target: Path) -> None:
        events.append(("rename", source.stat().st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_rename)
    write_text(tmp_path / "a" / "file", "text")
    file, folder = (tmp_path / "a" / "file").stat().st_ino, (tmp_path / "a").stat().st_ino
    assert events == [("sync", file), ("rename", file), ("sync", folder)]


def test_text_is_utf8_and_json_is_strict(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "σ² ≥ 0\n")
    assert (tmp_path / "text").read_bytes() == "σ² ≥ 0\n".encode()
    write_json(tmp_path / "json", {"σ": float("nan"), "n": 1})
    assert json.loads((tmp_path / "json").read_text(encoding="utf-8")) == {"σ": "NaN", "n": 1}


def test_a_link_moves_in_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    link = tmp_path / "last"
    point_to(link, "one")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut_off)
        with pytest.raises(CutOffError):
            point_to(link, "two")
    assert link.read_text() == "one"
    point_to(link, "two")
    assert link.read_text() == "two"
    assert os.readlink(link) == "two"  # relative: the folder may move
    assert {entry.name for entry in tmp_path.iterdir()} == {"one", "two", "last"}


def test_a_link_is_a_copy_where_links_are_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("a privilege is not held")

    monkeypatch.setattr(os, "symlink", refuse)
    (tmp_path / "one").write_text("one")
    point_to(tmp_path / "last", "one")
    assert (tmp_path / "last").read_text() == "one"
    assert not (tmp_path / "last").is_symlink()


def test_a_folder_appears_with_all_that_is_in_it(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new" / "out") as unfinished:
        (unfinished / "a").write_text("a")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "out" / "a").read_text() == "a"
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]


def test_a_folder_that_fails_leaves_nothing_and_no_parent(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "new" / "out") as unfinished:
            (unfinished / "a").write_text("a")
            raise CutOffError

    with pytest.raises(CutOffError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_made_over_nothing(tmp_path: Path) -> None:
    assert require_free_folder(tmp_path / "x" / ".." / "new") == (tmp_path / "new").resolve()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"--output: expected a new or an empty folder, got .*, which is not empty"
    ):
        require_free_folder(tmp_path)
    with pytest.raises(
        NotADirectoryError, match=r"--output: expected a new or an empty folder, got .*, which is a file"
    ):
        require_free_folder(tmp_path / "file")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which not even root may write")
def test_a_folder_that_cannot_be_written_names_the_option() -> None:
    with (
        pytest.raises(OSError, match=r"--output: expected a folder .*, got /proc: "),
        atomic_folder(Path("/proc/a/b")),
    ):
        shutil.copy(__file__, "/proc/a/b")


def replace(folder: Path) -> None:
    with replaced_folder(folder) as new:
        assert (folder / "file").read_text() == "old"
        new.mkdir()
        (new / "file").write_text("new")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_folder_that_cannot_be_replaced_is_where_it_was(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename, calls = tmp_path / "out", os.rename, []
    folder.mkdir()
    (folder / "file").write_text("old")

    def failing_once(*names: Any) -> None:
        calls.append(names)
        if len(calls) == failing + 1:
            raise OSError("busy")
        rename(*names)

    monkeypatch.setattr(os, "rename", failing_once)
    with pytest.raises(OSError, match="busy"):
        replace(folder)
    assert (folder / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]

    replace(folder)
    assert (folder / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_what_was_there_is_kept_even_where_it_cannot_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename, calls = tmp_path / "out", os.rename, []
    folder.mkdir()
    (folder / "file").write_text("old")

    def failing(*names: Any) -> None:
        calls.append(names)
        if len(calls) > 1:
            raise OSError("gone")
        rename(*names)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="gone"):
        replace(folder)

    (kept,) = tmp_path.glob(".out.*.before/out/file")
    assert kept.read_text() == "old"


def test_whether_a_folder_could_be_made_is_known_without_making_it(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--output: expected a folder that can be written, got .*file"):
        require_writable(tmp_path / "file" / "out")
