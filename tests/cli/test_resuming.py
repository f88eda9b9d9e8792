"""Resuming through the program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Grit = Callable[..., None]


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model.adapter.lora_alpha=9", "another adapter configuration: lora_alpha 7 → 9"),
        ("--data.batch_size=3", "batch_size 4 → 3"),
    ],
)
@pytest.mark.usefixtures("trained")
def test_a_refused_checkpoint_leaves_its_run_as_it_was(
    grit: Grit, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    grit("fit", "--ckpt_path=a/checkpoints/last.ckpt", "--trainer.max_steps=6")  # the middle of an epoch
    before = contents("a")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        grit("fit", "--ckpt_path=a/checkpoints/last.ckpt", "--trainer.max_steps=8", change)
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
    assert contents("a") == before


@pytest.mark.usefixtures("trained")
def test_last_is_the_newest_checkpoint_and_none_is_unfinished() -> None:
    checkpoints = Path("a/checkpoints")
    assert {path.name for path in checkpoints.iterdir()} == {"last.ckpt", "epoch=0-step=4.ckpt"}
    assert checkpoints.joinpath("last.ckpt").readlink() == Path("epoch=0-step=4.ckpt")
