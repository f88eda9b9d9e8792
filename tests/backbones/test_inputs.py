"""What a model takes: its context and who exceeds it, packed documents, and the arguments of its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedConfig

from grit_lightning.backbones.inputs import accepted_arguments, context_length, require_context, require_packing


class Alibi(nn.Module):
    """A model without positions and without a limit."""

    config = PreTrainedConfig()

    def forward(self, input_ids: Any) -> Any:
        raise AssertionError("never called")


def test_the_context_is_the_limit_and_its_excess_names_what_to_lower(tiny_llama: Any) -> None:
    assert context_length(tiny_llama) == 128
    require_context(tiny_llama, 128, "a sequence", "data.max_length")
    expected = r"Expected at most 128 tokens, the model's context, got 129 for a sequence\. Lower data\.max_length\."
    with pytest.raises(ValueError, match=expected):
        require_context(tiny_llama, 129, "a sequence", "data.max_length")


def test_a_model_that_names_no_context_has_no_limit() -> None:
    assert context_length(Alibi()) is None
    require_context(Alibi(), 10**9, "a sequence", "data.max_length")


def test_arguments_of_an_adapted_model_are_those_of_its_base(
    make_tiny_llama: Callable[..., Any], lora_config: Callable[..., Any]
) -> None:
    adapted = get_peft_model(make_tiny_llama(), lora_config())
    assert accepted_arguments(adapted) == accepted_arguments(make_tiny_llama())
    assert {"position_ids", "logits_to_keep"} <= accepted_arguments(adapted)
    assert accepted_arguments(Alibi()) == {"input_ids"}


def test_packing_needs_positions_and_with_flash_kernels_a_row_at_a_time(tiny_llama: Any) -> None:
    accepted = accepted_arguments(tiny_llama)
    require_packing(tiny_llama, accepted, 2)
    tiny_llama.config._attn_implementation_internal = "flash_attention_2"
    require_packing(tiny_llama, accepted, 1)
    with pytest.raises(ValueError, match=r"expected batches of one row, as flash_attention_2 .*, got 2 rows"):
        require_packing(tiny_llama, accepted, 2)
    with pytest.raises(ValueError, match=r"expected a model that takes position_ids, .* got Alibi, which takes none"):
        require_packing(Alibi(), accepted_arguments(Alibi()), 1)
