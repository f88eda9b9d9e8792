"""A checkpoint that is damaged, of another format, or of another model is refused before anything changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grit_lightning.checkpoints.reading import CHECKPOINT_FORMAT, grit_entry, require_format


@pytest.fixture(scope="module")
def stopped(shared_run: Any) -> Path:
    """A run of which 3 of 12 steps are done, in the middle of an epoch."""
    folder: Path = shared_run.stop("stopped", 3)
    (folder / "summary.json").write_text("{}")
    return folder


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
        (truncate, {}, r"a checkpoint that can be read, got .*, which is damaged or cut off"),
        (lambda path: path.write_bytes(b""), {}, r"a checkpoint that can be read, got .*, which is damaged or cut off"),
        (
            lambda path: torch.save([1], path),
            {},
            r"expected a checkpoint, which holds a dict, got .*, which holds a list",
        ),
        (lambda path: rewrite(path, lambda saved: saved.pop("grit")), {}, "got one without the entry 'grit'"),
        (
            lambda path: rewrite(path, lambda saved: saved["grit"].update(format_version=1)),
            {},
            rf"expected format version {CHECKPOINT_FORMAT}, got 1\. Resume it with the release .* or export it there",
        ),
        (None, {"backbone": {"num_hidden_layers": 3}}, "another backbone: num_hidden_layers 2 → 3"),
        (None, {"backbone": {"initializer_range": 0.03}}, "of this shape with other weights: 1. of 16 .* differ"),
        (None, {"adapter": {"lora_alpha": 16}}, "another adapter configuration: lora_alpha 8 → 16"),
        (None, {"adapter": {"r": 8}}, "another adapter configuration: r 4 → 8"),
        (None, {"adapter": {"target_modules": ["q_proj"]}}, "target_modules .'q_proj', 'v_proj'. → .'q_proj'."),
        (None, {"data": {"batch_size": 3}}, "after 6 of 9 batches of epoch 0: .* batch_size 2 → 3"),
    ],
)
def test_a_checkpoint_that_does_not_belong_here_is_refused_before_anything_changes(
    shared_run: Any,
    stopped: Path,
    tmp_path: Path,
    lora_config: Callable[..., Any],
    damage: Callable[[Path], Any] | None,
    settings: dict[str, Any],
    message: str,
) -> None:
    checkpoint = tmp_path / "other.ckpt"
    shutil.copy(shared_run.last(stopped), checkpoint)
    if damage is not None:
        damage(checkpoint)
    if "adapter" in settings:
        settings = {"module": {"adapter": lora_config(lora_dropout=0.2, **settings["adapter"])}}
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        shared_run("stopped", resume=checkpoint, **settings)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_a_missing_checkpoint_is_named(run: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a file, got .*nowhere\.ckpt, which does not exist"):
        run("a", resume=Path("nowhere.ckpt"))


def test_a_format_of_another_release_is_refused_by_name_with_what_to_do() -> None:
    require_format(CHECKPOINT_FORMAT)
    assert grit_entry({"grit": {"format_version": CHECKPOINT_FORMAT}}) == {"format_version": CHECKPOINT_FORMAT}
    for version in (CHECKPOINT_FORMAT - 1, CHECKPOINT_FORMAT + 1):
        with pytest.raises(
            ValueError, match=rf"old\.ckpt: expected format version {CHECKPOINT_FORMAT}, got {version}\."
        ):
            require_format(version, "old.ckpt")
