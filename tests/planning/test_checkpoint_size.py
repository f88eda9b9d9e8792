"""`file_size`: the bytes of a checkpoint from shapes, against the file that torch writes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from grit_lightning.planning.checkpoint_size import file_size


def content(device: str) -> dict[str, object]:
    return {
        "state": {"a": torch.zeros(100, 33, device=device), "b": torch.zeros(300, 7, device=device)},
        "counts": [torch.zeros(5, dtype=torch.int64, device=device), torch.zeros((), device=device)],
        "half": torch.zeros(11, dtype=torch.bfloat16, device=device),
        "name": "x" * 50,
    }


def test_it_is_the_size_of_the_file_that_torch_writes() -> None:
    written = io.BytesIO()
    torch.save(content("cpu"), written)
    assert file_size(content("meta")) == file_size(content("cpu")) == len(written.getvalue())


def test_it_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert file_size({"a": torch.zeros(10, device="meta")}) > 0
    assert list(tmp_path.iterdir()) == []
