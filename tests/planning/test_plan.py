"""What is counted from shapes, against real weights, optimizer states and steps of the same model."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from grit_lightning import GritLitModule
from grit_lightning.backbones.loading import load_backbone
from grit_lightning.backbones.shapes import empty_backbone
from grit_lightning.batches import Batch
from grit_lightning.errors import InvalidValueError
from grit_lightning.optimizers import EigenbasisAdam, NaturalAdam
from grit_lightning.planning.live_memory import LiveMemory
from grit_lightning.planning.parts import Parts, sharded, weight_bytes
from grit_lightning.planning.plan import Plan, plan_of
from grit_lightning.planning.rehearsal import MicroBatch, bytes_of, update_bytes

BATCH = MicroBatch(rows=3, tokens=48, prompt=20)


def module(folder: Path, lora: LoraConfig, **settings: Any) -> GritLitModule:
    return GritLitModule(str(folder), lora, **{"dtype": "float32", **settings})


def planned(
    built: GritLitModule,
    batch: MicroBatch = BATCH,
    precision: Precision = Precision(),  # noqa: B008 (has no state)
    *,
    accumulates: bool = False,
) -> Plan:
    return plan_of(built, [batch], batch, precision, processes=2, accumulates=accumulates)


def _llama(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4
    )


def real_batch(shape: MicroBatch = BATCH) -> Batch:
    """Rows of that shape, padded, as most are: a mask that hides nothing is left out by transformers."""
    content = shape.content()
    content["input_ids"] += torch.randint(4, 300, content["input_ids"].shape)
    content["attention_mask"][0, -3:] = 0
    content["labels"][0, -3:] = -100
    return content


def step(
    built: GritLitModule, optimizer: torch.optim.Optimizer, batch: Batch, precision: Precision | None = None
) -> None:
    """An optimizer step in Lightning's order, without Lightning."""
    assert built.geometry is not None
    built.geometry.start_micro_batch(batch["attention_mask"], 1.0)
    with (precision or Precision()).forward_context():
        loss = built(batch, trim=built.trim_logits).loss
    optimizer.zero_grad()
    loss.backward()
    built.geometry.finish_micro_batch()
    built.geometry.step(precondition=False)
    optimizer.step()


def real_peak(
    built: GritLitModule, optimizer: torch.optim.Optimizer, batch: Batch, precision: Precision | None = None
) -> int:
    """Bytes alive at the peak of the second step, beside model, statistics and states."""
    step(built, optimizer, batch, precision)
    gc.collect()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    with LiveMemory([*built.parameters(), *built.buffers(), *states, *batch.values()]) as memory:
        for parameter in built.parameters():
            if parameter.grad is not None:
                memory.follow(parameter.grad)
        step(built, optimizer, batch, precision)
    return memory.peak


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"trim_logits": True},
        {"gradient_checkpointing": True},
        {"dtype": "bfloat16"},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_activations_are_those_of_a_real_step(tiny_backbone_dir: Path, lora_config: Any, settings: Any) -> None:
    plan = planned(module(tiny_backbone_dir, lora_config(), **settings))
    real = module(tiny_backbone_dir, lora_config(), **settings)
    real.configure_model()
    optimizer = torch.optim.SGD([p for p in real.parameters() if p.requires_grad], lr=0.1)
    assert plan.parts.activations == pytest.approx(real_peak(real, optimizer, real_batch()), rel=0.15)


@pytest.mark.parametrize("precision", [Precision(), MixedPrecision("bf16-mixed", "cpu")], ids=["float32", "mixed"])
def test_packed_rows_and_autocast_take_what_they_take(
    tiny_backbone_dir: Path, lora_config: Any, precision: Precision
) -> None:
    shape = dataclasses.replace(BATCH, packed=True)
    plan = planned(module(tiny_backbone_dir, lora_config()), shape, precision)
    real = module(tiny_backbone_dir, lora_config())
    real.configure_model()
    optimizer = torch.optim.SGD([p for p in real.parameters() if p.requires_grad], lr=0.1)
    peak = real_peak(real, optimizer, real_batch(shape), precision)
    assert plan.parts.activations == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, EigenbasisAdam, NaturalAdam], ids=lambda kind: kind.__name__)
def test_states_are_those_after_a_real_step(tiny_backbone_dir: Path, lora_config: Any, optimizer: Any) -> None:
    plan = planned(module(tiny_backbone_dir, lora_config(), optimizer=optimizer))
    real = module(tiny_backbone_dir, lora_config(), optimizer=optimizer, lr_scheduler=None)
    real.configure_model()
    built: Any = real.configure_optimizers()
    with contextlib.suppress(RuntimeError):  # the module's hook after a step asks for a Trainer
        step(real, built, real_batch())
    states = [value for state in built.state.values() for value in state.values() if torch.is_tensor(value)]
    assert plan.parts.optimizer == sum(value.nbytes for value in states) > 0


def test_eight_bit_states_are_those_of_a_real_step() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes = [(16, 576), (20, 3)]  # small tensors keep 32 bits
    planned_bytes, real = (
        update_bytes(bnb.optim.AdamW8bit([torch.nn.Parameter(torch.zeros(size, device=device)) for size in sizes]))
        for device in ("meta", "cpu")
    )
    assert planned_bytes is not None
    assert real is not None
    assert planned_bytes.states == real.states < 2 * 4 * (16 * 576 + 20 * 3)


def test_an_optimizer_that_cannot_step_without_values_is_not_known() -> None:
    class NeedsValues(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("needs a GPU")

    assert update_bytes(NeedsValues([torch.nn.Parameter(torch.zeros(3, device="meta"))], lr=0.1)) is None


def test_weights_and_adapter_are_those_of_the_loaded_model(tiny_backbone_dir: Path, lora_config: Any) -> None:
    plan = planned(module(tiny_backbone_dir, lora_config(), dtype="bfloat16"))
    real = module(tiny_backbone_dir, lora_config(), dtype="bfloat16")
    real.configure_model()
    trained = [p for p in real.parameters() if p.requires_grad]
    frozen = [p for p in real.parameters() if not p.requires_grad]
    assert plan.parts.adapter == sum(p.nbytes for p in trained)
    assert plan.parts.weights == sum(p.nbytes for p in [*frozen, *real.buffers()])
    assert plan.trainable_parameters == sum(p.numel() for p in trained)
    assert plan.layers == {"q_proj": 2, "v_proj": 2}


def test_packed_weights_are_those_that_bitsandbytes_makes(tiny_backbone_dir: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = load_backbone(tiny_backbone_dir, dtype="float32", quantization="nf4")
    real = bytes_of([*model.parameters(), *model.buffers()])
    for weight in model.parameters():
        if (state := getattr(weight, "quant_state", None)) is not None:
            outer, inner = (state.absmax, state.code), (state.state2.absmax, state.state2.code, state.offset)
            real += sum(tensor.nbytes for tensor in (*outer, *inner))
    assert weight_bytes(empty_backbone(tiny_backbone_dir, dtype="float32"), nf4=True) == real


def test_sharding_divides_all_but_what_is_gathered(tiny_backbone_dir: Path) -> None:
    backbone = empty_backbone(tiny_backbone_dir, dtype="float32")
    parts = Parts(weight_bytes(backbone, nf4=False), adapter=10, optimizer=20, statistics=5, activations=100)
    assert sharded(parts, backbone, 1, 10, nf4=False) == parts
    deep = empty_backbone(LlamaForCausalLM(_llama(layers=12)), dtype="float32")
    whole = Parts(weight_bytes(deep, nf4=False), adapter=10, optimizer=20, statistics=5, activations=100)
    blocks = [sum(p.nbytes for p in block.parameters()) for block in deep.model.layers]
    buffers = sum(buffer.nbytes for buffer in deep.buffers())
    gathered = whole.weights - buffers - sum(blocks) + blocks[0] + blocks[1]
    of_many = sharded(whole, deep, 10_000, 10, nf4=False).weights
    assert of_many == pytest.approx(gathered + buffers, rel=0.01)  # an N-th of next to nothing is left
    assert of_many < sharded(whole, deep, 2, 10, nf4=False).weights < whole.weights


def test_a_window_of_several_micro_batches_keeps_its_gradients(tiny_backbone_dir: Path, lora_config: Any) -> None:
    one = planned(module(tiny_backbone_dir, lora_config(r=64), trim_logits=True))
    several = planned(module(tiny_backbone_dir, lora_config(r=64), trim_logits=True), accumulates=True)
    assert several.parts.activations > one.parts.activations


def test_a_start_that_needs_weights_is_refused(tiny_backbone_dir: Path, lora_config: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"model\.adapter: expected one that can be attached without weights"):
        planned(module(tiny_backbone_dir, lora_config(init_lora_weights="pissa")))


def test_random_numbers_are_left_alone(tiny_backbone_dir: Path, lora_config: Any) -> None:
    before = torch.get_rng_state()
    planned(module(tiny_backbone_dir, lora_config(lora_dropout=0.1)))
    assert torch.equal(torch.get_rng_state(), before)
