"""Which strategies are taken, and what is said about the others; how a network is cut into units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from grit_lightning.backbones.shapes import empty_backbone
from grit_lightning.distributed.collectives import (
    average_gradients,
    copy_from_first_process,
    gather_objects,
    sum_over_processes,
)
from grit_lightning.distributed.sharding import block_lists, materialize
from grit_lightning.distributed.strategies import GritFSDP2Strategy, GritFSDPStrategy, require_supported


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_strategies_that_split_the_adapter_are_refused(strategy: type[Any]) -> None:
    with pytest.raises(
        MisconfigurationException, match=rf"keeps the adapter whole, .* got {strategy.__name__}, .*ddp, grit_fsdp"
    ):
        require_supported(strategy.__new__(strategy))  # DeepSpeed's constructor wants DeepSpeed


@pytest.mark.parametrize(
    "strategy", [SingleDeviceStrategy("cpu"), DDPStrategy(), GritFSDPStrategy(), GritFSDP2Strategy()], ids=type
)
def test_strategies_that_keep_the_adapter_whole_are_taken(strategy: Any) -> None:
    require_supported(strategy)


def test_tensor_parallelism_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size: expected 1, .*, got 2\."):
        GritFSDP2Strategy(tensor_parallel_size=2)


ARCHITECTURES = {
    "llama": ({"num_hidden_layers": 3}, "LlamaDecoderLayer"),
    "gpt2": ({"n_layer": 3}, "GPT2Block"),
    "gpt_neox": ({"num_hidden_layers": 3}, "GPTNeoXLayer"),
    "opt": ({"num_hidden_layers": 3}, "OPTDecoderLayer"),
    "mixtral": ({"num_hidden_layers": 3}, "MixtralDecoderLayer"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_found_without_their_class(name: str) -> None:
    settings, block = ARCHITECTURES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings))
    (blocks,) = block_lists(model)
    assert [type(each).__name__ for each in blocks] == [block] * 3


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a list of repeated blocks .* got a Linear, which has none"):
        block_lists(nn.Linear(2, 2))


def test_an_empty_backbone_has_the_names_shapes_and_ties_of_the_loaded_one(tiny_backbone_dir: Any) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_backbone_dir, dtype=torch.bfloat16)
    empty = empty_backbone(tiny_backbone_dir, dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in empty.parameters())
    materialize(list(empty.modules()), torch.device("cpu"))
    described = [
        {n: (t.shape, t.dtype) for n, t in [*m.named_parameters(), *m.named_buffers()]} for m in (loaded, empty)
    ]
    assert described[0] == described[1]


def test_tied_weights_stay_tied_when_they_become_real() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=1, tie_word_embeddings=True, hidden_size=32, vocab_size=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    materialize(list(model.modules()), torch.device("cpu"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_alone_nothing_is_communicated_and_nothing_changes() -> None:
    value, parameter = torch.tensor([1.0, 2.0]), nn.Parameter(torch.ones(2))
    sum_over_processes([value])
    average_gradients([parameter])
    copy_from_first_process([value])
    assert gather_objects("mine") == ["mine"]
    assert value.tolist() == [1.0, 2.0]
    assert parameter.grad is None
