"""Statistics of a trained adapter: what training would have collected, from any rows, without leaving a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from grit_lightning import GeometryConfig
from grit_lightning.editing import AdapterStatistics, measure_statistics
from grit_lightning.editing.methods import first_order
from grit_lightning.editing.rows import batches_of
from grit_lightning.errors import DivergedError
from grit_lightning.geometry_steps import GeometrySteps


def _keep(kept: list[Tensor], _module: Any, _args: Any, out: Tensor) -> None:
    out.retain_grad()
    kept.append(out)


def reference(model: PeftModel, rows: Any, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_a, Σ_g and Bᵀ∇B of one layer, from own hooks, one row at a time, in float64."""
    module = model.get_submodule(layer)
    down, up = module.lora_A["default"], module.lora_B["default"]
    a_sum, g_sum, grad = torch.zeros(4, 4).double(), torch.zeros(4, 4).double(), torch.zeros_like(up.weight).double()
    tokens = 0
    for row in rows:
        kept: list[Tensor] = []
        handle = down.register_forward_hook(partial(_keep, kept))
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1]
        start, end = row["learnt"]
        wanted = range(max(start, 1), end)
        loss = sum(-logits[t - 1].log_softmax(-1)[ids[0, t]] for t in wanted)
        model.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        handle.remove()
        a, g = kept[0].detach()[0].double(), kept[0].grad[0].double()  # type: ignore[index]
        a_sum, g_sum, grad = a_sum + a.T @ a, g_sum + g.T @ g, grad + up.weight.grad.double()
        tokens += len(row["input_ids"])
    model.zero_grad()
    return a_sum / tokens, g_sum / tokens, up.weight.detach().double().T @ grad / tokens


def trainable(model: PeftModel) -> PeftModel:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def test_they_are_those_of_a_reference_with_its_own_hooks(adapted: PeftModel, task_rows: Callable[..., Any]) -> None:
    rows = task_rows(7, 5)
    found = measure_statistics(adapted, rows, batch_size=3).groups[0]
    for index in (0, len(found.names) - 1):
        a, g, cross = reference(trainable(adapted), rows, found.names[index])
        torch.testing.assert_close(found.a_cov[index].double(), a, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(found.g_cov[index].double(), g, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(found.cross[index].double(), cross, rtol=1e-3, atol=1e-6)


def test_batching_changes_the_rounding_only(adapted: PeftModel, task_rows: Callable[..., Any]) -> None:
    one, many = (measure_statistics(adapted, task_rows(8, 5), batch_size=size) for size in (1, 5))
    assert (one.tokens, one.predicted) == (many.tokens, many.predicted)
    torch.testing.assert_close(one.groups[0].a_cov, many.groups[0].a_cov, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(one.groups[0].g_cov, many.groups[0].g_cov, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(one.groups[0].cross, many.groups[0].cross, rtol=1e-3, atol=1e-6)


def test_they_are_what_training_collects(adapted: PeftModel, task_rows: Callable[..., Any]) -> None:
    """The same batches through the calls of a training loop, whose weights do not move."""
    rows = task_rows(8, 5)
    measured = measure_statistics(copy.deepcopy(adapted), rows, batch_size=4).groups[0]
    steps = GeometrySteps(trainable(adapted).eval(), GeometryConfig(cov_averaging="mean"))
    optimizer = steps.connect(torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.0))
    for _, batch in batches_of(rows, 4, torch.device("cpu")):
        steps.start_micro_batch(batch["attention_mask"], int((batch["labels"][:, 1:] != -100).sum()))
        steps.take_loss(adapted(**batch).loss).backward()
        steps.finish_micro_batch()
        steps.before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
    assert steps.geometry is not None
    torch.testing.assert_close(measured.a_cov, steps.geometry.groups[0].a_cov, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(measured.g_cov, steps.geometry.groups[0].g_cov, rtol=1e-3, atol=1e-7)


def test_no_trace_is_left_in_the_model(adapted: PeftModel, task_rows: Callable[..., Any]) -> None:
    trainable(adapted).train()
    adapted.get_submodule("base_model.model.lm_head").eval()
    some = next(p for p in adapted.parameters() if p.requires_grad)
    some.grad = torch.ones_like(some)
    before = [(p.requires_grad, p.detach().clone()) for p in adapted.parameters()]
    modes = [module.training for module in adapted.modules()]
    state = torch.get_rng_state()
    measure_statistics(adapted, task_rows(4, 5))
    assert [module.training for module in adapted.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert some.grad is not None
    assert bool((some.grad == 1).all())
    assert sum(p.grad is not None for p in adapted.parameters()) == 1
    for parameter, (requires_grad, value) in zip(adapted.parameters(), before, strict=True):
        assert parameter.requires_grad == requires_grad
        assert torch.equal(parameter, value)
    assert not any(module._forward_hooks for name, module in adapted.named_modules() if "lora_A" in name)


def test_dropout_is_off(knowing_backbone: Any, adapter_dir: Any, task_rows: Callable[..., Any]) -> None:
    def model(dropout: float) -> PeftModel:
        from transformers import LlamaForCausalLM

        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, lora_dropout=dropout)
        return get_peft_model(LlamaForCausalLM.from_pretrained(knowing_backbone), config).train()

    with_dropout, without = (measure_statistics(model(p), task_rows(4, 5)).groups[0].a_cov for p in (0.5, 0.0))
    torch.testing.assert_close(with_dropout, without)


def test_sources_are_mixed_by_weight(
    adapted: PeftModel, task_rows: Callable[..., Any], general_rows: Callable[..., Any]
) -> None:
    parts = [measure_statistics(adapted, rows) for rows in (task_rows(4, 5), general_rows(9, 6))]
    mixed = AdapterStatistics.mixed(parts, [1.0, 3.0])
    first, second = parts
    torch.testing.assert_close(mixed.groups[0].a_cov, 0.25 * first.groups[0].a_cov + 0.75 * second.groups[0].a_cov)
    for name in ("g_cov", "cross"):
        of_first, of_second = (part.per_predicted * getattr(part.groups[0], name) for part in parts)
        torch.testing.assert_close(getattr(mixed.groups[0], name), 0.25 * of_first + 0.75 * of_second)
    assert first.per_predicted != second.per_predicted
    assert mixed.per_predicted == 1.0
    x = {name: torch.rand(4, 4) for name in first.groups[0].names}
    assert first_order(mixed, x) == pytest.approx(
        0.25 * first_order(first, x) + 0.75 * first_order(second, x), rel=1e-4
    )


def test_rows_that_predict_nothing_do_not_count(adapted: PeftModel, task_rows: Callable[..., Any]) -> None:
    rows = task_rows(6, 5)
    silent = [{**row, "learnt": []} for row in task_rows(5, 6)]
    alone = measure_statistics(adapted, rows, batch_size=4)
    mixed = measure_statistics(adapted, [*rows, *silent], batch_size=4)
    assert (mixed.tokens, mixed.predicted) == (alone.tokens, alone.predicted)
    torch.testing.assert_close(mixed.groups[0].g_cov, alone.groups[0].g_cov)


def test_a_layer_that_rows_pass_by_is_refused(adapted: PeftModel, task_rows: Callable[..., Any]) -> None:
    layer = adapted.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    layer.forward = layer.get_base_layer().forward
    with pytest.raises(ValueError, match=r"got 1 of 6 that do not, first .*layers\.1\.mlp\.down_proj"):
        measure_statistics(adapted, task_rows(4, 5))


def test_layers_of_several_ranks_are_kept_apart(knowing_backbone: Any, task_rows: Callable[..., Any]) -> None:
    from transformers import LlamaForCausalLM

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(knowing_backbone), config)
    statistics = measure_statistics(model, task_rows(4, 5))
    assert sorted(group.a_cov.shape[-1] for group in statistics.groups) == [2, 4]
    assert all(name.endswith("v_proj") == (g.a_cov.shape[-1] == 2) for g in statistics.groups for name in g.names)


def test_an_adapter_that_has_diverged_is_refused(adapted: PeftModel, task_rows: Callable[..., Any]) -> None:
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name).fill_(torch.inf)
    with pytest.raises(DivergedError, match="diverged"):
        measure_statistics(adapted, task_rows(4, 5))
