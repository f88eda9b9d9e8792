"""How the model is executed must not show in the statistics: recomputation, dropout, adapters, sharing, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from grit_lightning import GeometryConfig, RankSpaceGeometry


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_every_token_once(
    reentrant: bool, make_module: Any, random_batch: Any, fit: Any, truth: Any, assert_agrees: Any
) -> None:
    batches = [random_batch(batch=2, length=12, pad=[0, 5], seed=seed) for seed in range(2)]
    module = make_module(gradient_checkpointing=True)
    expected = truth(make_module().peft_model, batches)
    if reentrant:
        base = module.peft_model.get_base_model()
        base.enable_input_require_grads()  # the re-entrant kind needs it: the backbone's own weights are frozen
        base.activation_checkpointing_enable({"use_reentrant": True})
    passes = []
    module.peft_model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    module.train()  # it checkpoints in training mode only
    fit(module, batches)
    assert (
        len(passes) == 5
    )  # recomputed indeed: twice for each of two batches, after the one pass that finds silent layers
    assert_agrees(module.geometry, expected)
    assert {view.n_samples for view in module.geometry} == {
        sum(int(batch["attention_mask"].sum()) for batch in batches)
    }


def test_lora_dropout_is_part_of_the_activation(
    make_tiny_llama: Any,
    lora_config: Any,
    randomize: Any,
    random_batch: Any,
    measure: Any,
    truth: Any,
    assert_agrees: Any,
) -> None:
    model = randomize(get_peft_model(make_tiny_llama(), lora_config(lora_dropout=0.5))).train()
    batch = random_batch(batch=1, length=24)  # one row, so that the same seed draws the same masks for the truth
    expected = truth(model, [batch], seed=5)
    without = truth(model.eval(), [batch])
    assert_agrees(measure(model.train(), [batch], seed=5), expected)
    with pytest.raises(AssertionError):
        assert_agrees(measure(model.train(), [batch], seed=5), without, a=0.1, g=0.1)


def test_only_the_active_adapter_is_seen(
    make_tiny_llama: Any,
    lora_config: Any,
    randomize: Any,
    random_batch: Any,
    measure: Any,
    truth: Any,
    assert_agrees: Any,
) -> None:
    model = get_peft_model(make_tiny_llama(), lora_config())
    model.add_adapter("other", lora_config(r=2, target_modules=["v_proj", "up_proj"]))
    for name in ("default", "other"):
        model.set_adapter(name)
        randomize(model)
    batch = random_batch(batch=2, length=12, pad=[0, 3])
    for name, layers, r in (("default", ("q_proj", "v_proj"), 4), ("other", ("v_proj", "up_proj"), 2)):
        model.set_adapter(name)
        expected = truth(model, [batch])
        assert {layer.rpartition(".")[2] for layer in expected} == set(layers)
        idle = {key: p.detach().clone() for key, p in model.named_parameters() if f".{name}." not in key}
        geometry = measure(model, [batch], config=GeometryConfig(kfac_update_freq=1, kfac_min_samples=1))
        assert {group.r for group in geometry.groups} == {r}
        assert_agrees(geometry, expected)
        for key, parameter in model.named_parameters():
            assert key not in idle or parameter.grad is None
        geometry.detach()
        model.zero_grad()
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"expected one active adapter .* got 2: \['default', 'other'\]"):
        RankSpaceGeometry(model, GeometryConfig())


@pytest.mark.parametrize("shared", ["projection", "layer"])
def test_a_module_that_fires_twice_counts_both_of_its_uses(
    shared: str,
    make_tiny_llama: Any,
    lora_config: Any,
    randomize: Any,
    random_batch: Any,
    measure: Any,
    truth: Any,
    assert_agrees: Any,
) -> None:
    model = get_peft_model(make_tiny_llama(), lora_config())
    layers = model.get_base_model().model.layers
    if shared == "projection":
        layers[1].self_attn.q_proj = layers[0].self_attn.q_proj
    else:
        layers[1] = layers[0]
    randomize(model)
    batch = random_batch(batch=2, length=12, pad=[0, 3])
    geometry = measure(model, [batch])
    assert_agrees(geometry, truth(model, [batch]))
    tokens = int(batch["attention_mask"].sum())
    uses = {name: view.n_samples // tokens for name, view in geometry.layers.items()}
    expected = {"layers.0.self_attn.q_proj": 2, "layers.0.self_attn.v_proj": 1 if shared == "projection" else 2}
    if shared == "projection":
        expected["layers.1.self_attn.v_proj"] = 1
    assert uses == {f"base_model.model.model.{name}": count for name, count in expected.items()}


def test_what_is_compiled_does_not_depend_on_how_many_micro_batches_there_were(make_module: Any) -> None:
    """A compiled training step would else be compiled anew each time, until torch gives up at the eighth."""
    geometry, mask = make_module().geometry, torch.ones(1, 4)

    @torch.compile(backend="eager")
    def start() -> torch.Tensor:
        geometry.start_micro_batch(mask, 1.0)
        return mask + 1

    torch._dynamo.reset()
    frames = []
    for _ in range(4):
        start()
        geometry.finish_micro_batch()
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    torch._dynamo.reset()
    assert frames[0] > 0
    assert frames == [frames[0]] * 4
