"""Fixtures of the export's tests: trained modules of uneven ranks, their checkpoints, and the command that refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from torch import Tensor, nn

from grit_lightning import GritLitModule
from grit_lightning.cli.program import main

RankOf = Callable[[int, str, int], int]
SITE_PREFIX = "base_model.model."


@pytest.fixture
def batch(random_batch: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    return random_batch(pad=[0, 3])


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return output


@pytest.fixture
def logits() -> Callable[..., Tensor]:
    """`logits(model, batch)` in evaluation mode."""
    return _logits


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    named = model.named_modules()
    return {name.removeprefix(SITE_PREFIX): module for name, module in named if getattr(module, "lora_A", None)}


@pytest.fixture
def lora_layers() -> Callable[..., dict[str, Any]]:
    """`lora_layers(model)`: its LoRA layers by their name in the backbone."""
    return _lora_layers


def _uneven(index: int, name: str, r: int) -> int:
    return 1 + index % r


def _first_block_empty(index: int, name: str, r: int) -> int:
    return 0 if "layers.0" in name else _uneven(index, name, r)


@pytest.fixture
def first_block_empty() -> RankOf:
    """Ranks of an adapter that learnt nothing in the first of its two blocks."""
    return _first_block_empty


def _give_ranks(module: GritLitModule, rank_of: RankOf = _uneven) -> None:
    ranks = {}
    for index, (name, layer) in enumerate(_lora_layers(module.peft_model).items()):
        b = layer.lora_B["default"].weight.data
        ranks[name] = rank_of(index, name, b.shape[1])
        b.normal_(std=0.3)
        b[:, ranks[name] :] = 0.0
    if module.geometry is not None:
        for group in module.geometry.groups:
            for index, site in enumerate(group.sites):
                group.ranks[index] = max(ranks[site.name.removeprefix(SITE_PREFIX)], 1)


@pytest.fixture
def give_ranks() -> Callable[..., None]:
    """`give_ranks(module)` sets B to noise in its first columns and to zero beyond, as training at these ranks would."""
    return _give_ranks


@pytest.fixture
def make_module(tiny_backbone_dir: Path, lora_config: Callable[..., LoraConfig]) -> Callable[..., GritLitModule]:
    """A factory of built modules on the tiny Llama with uneven effective ranks; keywords go to the LoraConfig."""

    def make(rank_of: RankOf = _uneven, quantization: str | None = None, **lora: Any) -> GritLitModule:
        module = GritLitModule(str(tiny_backbone_dir), lora_config(**lora), dtype="float32", quantization=quantization)
        module.configure_model()
        _give_ranks(module, rank_of)
        return module

    return make


def _save(module: GritLitModule, path: Path, global_step: int = 7) -> Path:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return _edit(path, lambda content: content.update(global_step=global_step))


@pytest.fixture
def save() -> Callable[..., Path]:
    """`save(module, path)` writes the checkpoint that a Trainer would write after 7 optimizer steps, and gives its path."""
    return _save


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


@pytest.fixture
def edit() -> Callable[..., Path]:
    """`edit(path, change)` has `change` work on the content of a checkpoint."""
    return _edit


@pytest.fixture
def checkpoint(make_module: Callable[..., GritLitModule], tmp_path: Path) -> Path:
    """The checkpoint of a module as `make_module` builds it."""
    return _save(make_module(), tmp_path / "trained.ckpt")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused(*words)` runs `grit export`, and gives its one line of complaint after making sure that it left nothing."""

    def run(*words: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises(SystemExit) as stopped:
            main(["export", *words])
        assert stopped.value.code == 1
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        message = capsys.readouterr().err
        assert message.startswith("grit: error: ")
        assert len(message.splitlines()) == 1
        return message

    return run
