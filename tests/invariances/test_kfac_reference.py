"""Our factors against those of curvlinops, an independent K-FAC, in float64.

How its conventions map to ours. It takes K-FAC of a whole linear layer; in rank space the two factors sit in two layers:
Σ_a is the input covariance of lora_B, and Σ_g the output-gradient covariance of lora_A.

- `fisher_type="empirical"`: gradients at the labels of the data, as in training, not at labels drawn from the model.
- `kfac_approx="expand"`: every token is a sample of its own (Eschenhagen et al. 2023), which ours is too. `reduce` would
  average a, and sum g, over a sequence first.
- `CrossEntropyLoss(reduction="sum")`: g is the gradient of the sum of token losses. With `mean` it would carry 1/N_labels,
  which curvlinops puts back in part: its factors multiply to the Fisher of the mean loss.
- It divides the input covariance by the number of inputs and leaves the gradient one a sum over tokens, since only
  their product matters to it. Ours are both means over tokens, so its gradient factor is divided by their number.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("curvlinops") is None,
    reason="needs curvlinops-for-pytorch, the independent K-FAC: pip install .[reference]",
)


class Logits(nn.Module):
    """Next-token logits `[B, V, T − 1]` of a batch of ids, in the layout that CrossEntropyLoss takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits[:, :-1].transpose(1, 2)


def test_factors_agree_with_curvlinops(
    make_module: Callable[..., Any], random_batch: Any, lora_config: Any, measure: Any
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its dependency linear_operator calls torch.jit.script
        from curvlinops import KFACLinearOperator

    adapter = lora_config(target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    model = make_module(adapter=adapter, geometry=None).peft_model.double()
    batch = random_batch(batch=4, length=10)
    geometry = measure(model, [batch])
    ids, labels = batch["input_ids"], batch["labels"][:, 1:]
    kfac = KFACLinearOperator(
        Logits(model),
        nn.CrossEntropyLoss(reduction="sum"),
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        [(ids, labels)],
        fisher_type="empirical",
        kfac_approx="expand",
        check_deterministic=False,
    )
    kfac.compute_kronecker_factors()
    for name, view in geometry.layers.items():
        a_cov = kfac._input_covariances[f"model.{name}.lora_B.default"]
        g_cov = kfac._gradient_covariances[f"model.{name}.lora_A.default"] / ids.numel()
        # Ours are kept in float32 by design, whatever the model computes in: one rounding of 2⁻²⁴ an entry.
        torch.testing.assert_close(view.a_cov.double(), a_cov, rtol=1e-6, atol=1e-7 * float(a_cov.abs().max()))
        torch.testing.assert_close(view.g_cov.double(), g_cov, rtol=1e-6, atol=1e-7 * float(g_cov.abs().max()))
