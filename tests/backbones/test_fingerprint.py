"""A backbone's fingerprint: the same in any dtype, another one for other weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from grit_lightning.backbones.fingerprint import backbone_fingerprint, require_backbone


def test_a_backbone_is_known_in_another_dtype_and_not_by_other_weights(make_tiny_llama: Callable[..., Any]) -> None:
    original = backbone_fingerprint(make_tiny_llama())
    require_backbone(original, backbone_fingerprint(make_tiny_llama().bfloat16()))
    require_backbone(backbone_fingerprint(make_tiny_llama().bfloat16()), original)
    tuned = make_tiny_llama()
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight[0, 0] += 0.1
        tuned.lm_head.weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match="other weights"):
        require_backbone(original, backbone_fingerprint(tuned))
