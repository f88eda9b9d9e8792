"""Mistakes: one line that says what to change, and nothing written.

- Checkpoints that are damaged, foreign, untrained, diverged or contradict themselves.
- Outputs that are taken or cannot be written; a failure halfway.
- A module that is not built; a backbone that is missed only where it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import LlamaForCausalLM

from grit_lightning import GritLitModule
from grit_lightning.cli.program import main
from grit_lightning.export.adapter import export_adapter

LoraLayers = Callable[..., dict[str, Any]]
Save = Callable[..., Path]
Edit = Callable[..., Path]
Refused = Callable[..., str]


def _without_training(content: dict[str, Any]) -> None:
    for name, value in content["state_dict"].items():
        if "lora_B" in name:
            value.zero_()


def _beyond_its_rank(content: dict[str, Any]) -> None:
    content["grit"]["ranks"]["base_model.model.model.layers.1.self_attn.q_proj"] = 1


BAD_CONTENT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "step 0": (lambda c: c.update(global_step=0), "expected a trained adapter, got one of optimizer step 0"),
    "B zero": (_without_training, "expected trained weights, got a B of zeros in every layer"),
    "not grit": (
        lambda c: c.pop("grit"),
        "or of a module that calls GeometryHooks, got a file with [",
    ),
    "other version": (lambda c: c["grit"].update(format_version=99), "got 99. Resume it with"),
    "contradiction": (_beyond_its_rank, "expected zeros in B beyond its effective rank 1, got a column"),
    "diverged": (
        lambda c: next(iter(c["state_dict"].values())).fill_(math.nan),
        "expected finite weights, got NaN or infinity",
    ),
    "half a layer": (lambda c: c["state_dict"].popitem(), "expected A and B of every layer, got only one of them"),
}


@pytest.mark.parametrize(("change", "complaint"), BAD_CONTENT.values(), ids=BAD_CONTENT.keys())
@pytest.mark.parametrize("merge", [[], ["--merge"]], ids=["adapter", "merge"])
def test_bad_checkpoints(
    change: Callable[[dict[str, Any]], Any],
    complaint: str,
    merge: list[str],
    checkpoint: Path,
    tmp_path: Path,
    edit: Edit,
    refused: Refused,
) -> None:
    edit(checkpoint, change)
    assert complaint in refused(f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'new' / 'out'}", *merge)


def test_damaged_files(checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    output = f"--output={tmp_path / 'out'}"
    whole = checkpoint.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        checkpoint.write_bytes(whole[:length])
        assert "expected a checkpoint that can be read" in refused(f"--ckpt_path={checkpoint}", output)
    torch.save(torch.ones(3), checkpoint)
    assert "which holds a Tensor" in refused(f"--ckpt_path={checkpoint}", output)
    assert "does not exist" in refused(f"--ckpt_path={tmp_path / 'no.ckpt'}", output)
    assert "is a folder" in refused(f"--ckpt_path={tmp_path}", output)


def test_output_that_is_taken(checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    export_adapter(checkpoint, taken)  # empty, so it may be filled
    assert "is not empty" in refused(f"--ckpt_path={checkpoint}", f"--output={taken}")
    assert "is a file" in refused(f"--ckpt_path={checkpoint}", f"--output={checkpoint}")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which not even root may write")
def test_output_that_cannot_be_written(checkpoint: Path, refused: Refused) -> None:
    assert "--output: expected a folder that can be written, got /proc" in refused(
        f"--ckpt_path={checkpoint}", "--output=/proc/a/b"
    )


def test_failure_while_writing_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("grit_lightning.export.adapter.card", fail)  # the last thing that is written
    with pytest.raises(OSError, match="disk full"):
        export_adapter(checkpoint, tmp_path / "new" / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_backbone_matters_only_for_merging(
    checkpoint: Path,
    tiny_llama: LlamaForCausalLM,
    tmp_path: Path,
    lora_layers: LoraLayers,
    edit: Edit,
    refused: Refused,
) -> None:
    edit(checkpoint, lambda content: content["grit"]["model"].update(backbone="/no/such/backbone"))
    words = (f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'out'}")
    assert "/no/such/backbone" in refused(*words, "--merge")
    main(["export", *words])
    assert lora_layers(PeftModel.from_pretrained(tiny_llama, tmp_path / "out"))


def test_module_that_is_not_built(lora_config: Callable[..., LoraConfig], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="expected one that is built, got none yet"):
        export_adapter(GritLitModule("x/y", lora_config()), tmp_path / "out")
