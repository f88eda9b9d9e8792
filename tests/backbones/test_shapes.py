"""Backbones without weights: of names and of instances, and when they are what the caller wants."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from transformers import LlamaForCausalLM

from grit_lightning.backbones.loading import load_backbone
from grit_lightning.backbones.shapes import empty_backbone, wants_shapes_only


def _described(model: nn.Module) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_folder_gives_the_shapes_and_types_of_what_would_be_loaded(tiny_backbone_dir: Path, dtype: str) -> None:
    empty = empty_backbone(tiny_backbone_dir, dtype=dtype)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert not any(parameter.requires_grad for parameter in empty.parameters())
    assert _described(empty) == _described(load_backbone(tiny_backbone_dir, dtype=dtype))


def test_a_gguf_file_gives_them_too_and_its_header_is_read_anew_when_it_changes(
    gguf_file: Path, make_tiny_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    from grit_lightning.backbones import reading

    assert _described(empty_backbone(gguf_file)).keys() == _described(load_backbone(gguf_file)).keys()
    read = reading.read_pretrained
    calls: list[str] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args[1])
        return read(*args, **options)

    monkeypatch.setattr(reading, "read_pretrained", counted)
    empty_backbone(gguf_file)
    assert calls == []  # as it takes seconds for a real vocabulary
    gguf_file.write_bytes(gguf_file.read_bytes() + b"\0" * 32)
    empty_backbone(gguf_file)
    assert calls == ["backbone"]


def test_an_instance_is_copied_as_it_was_changed_and_left_as_it_is(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.model.layers = tiny_llama.model.layers[:1]
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    empty = empty_backbone(tiny_llama)
    assert _described(empty) == _described(tiny_llama)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in empty.buffers()} == {"meta"}
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())
    assert tiny_llama.config.use_cache


def test_tied_weights_of_an_instance_stay_tied(make_tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    empty = empty_backbone(make_tiny_llama(tie_word_embeddings=True))
    assert empty.lm_head.weight is empty.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "fp32"}, "dtype"), ({"quantization": "int8"}, "quantization"), ({"revision": "main"}, "revision")],
    ids=str,
)
def test_options_are_checked_as_for_loading(tiny_backbone_dir: Path, options: dict[str, Any], message: str) -> None:
    for load in (empty_backbone, load_backbone):
        with pytest.raises(ValueError, match=f"^{message}: expected"):
            load(tiny_backbone_dir, **options)


def test_shapes_are_wanted_on_the_meta_device_and_where_nothing_is_initialised() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    contexts = {"none": nullcontext(), "cpu": torch.device("cpu"), "module": trainer.init_module()}
    for name, context in contexts.items():
        with context:
            assert not wants_shapes_only(), name
    for context in (torch.device("meta"), trainer.init_module(empty_init=True)):
        state = torch.get_rng_state()
        with context:
            assert wants_shapes_only()
        assert torch.equal(torch.get_rng_state(), state)
