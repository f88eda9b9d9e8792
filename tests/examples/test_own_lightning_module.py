"""The example of an own LightningModule runs as it stands, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.mark.filterwarnings("ignore:.* logger")  # Lightning's default logger; the example chooses none
def test_it_trains_resumes_exports_and_loads_in_plain_peft(
    example: Any, tiny_backbone_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example("own_lightning_module").main(str(tiny_backbone_dir), 32, tmp_path)
    said = capsys.readouterr().out
    assert "Mean rank" in said
    assert "12 + 30 =" in said.splitlines()[-1]
    steps = [torch.load(tmp_path / f"epoch_{n}.ckpt", weights_only=True)["global_step"] for n in (1, 2)]
    assert steps == [4, 8]
    ranks = torch.load(tmp_path / "epoch_2.ckpt", weights_only=True)["grit"]["ranks"]
    assert min(ranks.values()) < 8
    exported = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert exported["r"] < 8 or exported["rank_pattern"]
