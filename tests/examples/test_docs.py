"""What docs/own_module.md shows runs: its module fits, resumes and is exported, and its loop comes to the same statistics."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from grit_lightning import GeometrySteps
from grit_lightning.callbacks import RankAdaptation, Reprojection, SpectraLogger
from grit_lightning.export import export_adapter

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "own_module.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """The names that the page's code makes."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    names: dict[str, Any] = {"GeometrySteps": GeometrySteps, "__name__": "own_module"}
    exec(compile("\n".join(blocks), "docs/own_module.md", "exec"), names)
    return names


@pytest.fixture
def batches(random_batch: Callable[..., dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [random_batch(batch=2, length=10, pad=[1, 3], prompt=2, seed=seed) for seed in range(4)]


def trainer(folder: Path, epochs: int) -> pl.Trainer:
    callbacks: list[pl.Callback] = [Reprojection(every_n_steps=2), RankAdaptation(every_n_steps=2), SpectraLogger()]
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, default_root_dir=folder, **quiet)


def test_the_module_trains_resumes_and_is_exported(
    shown: dict[str, Any], batches: Any, tiny_backbone_dir: Path, tmp_path: Path
) -> None:
    loader = DataLoader(batches, batch_size=None)
    begun = trainer(tmp_path, 1)
    begun.fit(shown["MyModule"](str(tiny_backbone_dir)), loader)
    begun.save_checkpoint(tmp_path / "own.ckpt")
    module = shown["MyModule"](str(tiny_backbone_dir))
    trainer(tmp_path, 2).fit(module, loader, ckpt_path=tmp_path / "own.ckpt", weights_only=True)
    tokens = 2 * sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert {view.n_samples for view in module.geometry} == {tokens}
    assert export_adapter(module.hooks, tmp_path / "adapter").parameters > 0


def test_the_loop_takes_the_statistics_of_every_token(
    shown: dict[str, Any], batches: Any, tiny_backbone_dir: Path
) -> None:
    model = shown["MyModule"](str(tiny_backbone_dir)).model
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    hooks = shown["train"](model, batches, steps_per_window=2)
    assert {view.n_samples for view in hooks.geometry} == {sum(int(batch["attention_mask"].sum()) for batch in batches)}
    after = [p for p in model.parameters() if p.requires_grad]
    assert not all(map(torch.equal, before, after))


def test_the_page_names_files_that_are_there() -> None:
    names = set(re.findall(r"examples/\w+\.py", PAGE))
    assert names == {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
