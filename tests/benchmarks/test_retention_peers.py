"""The peers of retention that act in training: each gradient against autograd on what its penalty says, in float64."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = ("ewc", "lalora_diag", "lalora_kfac", "change_kfac")
STRENGTH = 0.7
BLOCKS = [torch.randint(4, 260, (9,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(3)]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("retention_peers")


@pytest.fixture
def peers(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The peers, on three short blocks instead of general text."""
    monkeypatch.setattr(module, "general_blocks", lambda *_: itertools.cycle(BLOCKS))
    monkeypatch.setattr(module, "FISHER_BLOCKS", len(BLOCKS))
    return module


@pytest.fixture
def start(make_tiny_llama: Callable[..., Any], lora_config: Callable[..., Any]) -> PeftModel:
    """An adapter as PEFT starts it, s = 2, float64."""
    return get_peft_model(make_tiny_llama(num_hidden_layers=1), lora_config()).double()


def _loss(model: PeftModel, block: list[int]) -> Tensor:
    ids = torch.tensor([block])
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _factors(model: PeftModel) -> list[tuple[Tensor, Tensor]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(zip(trained[::2], trained[1::2], strict=True))


def _added(model: PeftModel, peer: Any) -> list[Tensor]:
    """What `add_gradients` adds to gradients that are there already."""
    parameters = [p for pair in _factors(model) for p in pair]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    peer.add_gradients(0)
    return [parameter.grad - 1.0 for parameter in parameters if parameter.grad is not None]


def _assert_gradient_of(penalty: Tensor, model: PeftModel, added: list[Tensor]) -> None:
    parameters = [p for pair in _factors(model) for p in pair]
    for found, expected in zip(added, torch.autograd.grad(penalty, parameters, materialize_grads=True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def _tokens(model: PeftModel) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """For each predicting token of the blocks, (a, s·δ, x) of every layer; δ by perturbing the layer's output."""
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    for block in BLOCKS:
        inputs: list[Tensor] = []
        moves: list[Tensor] = []

        def perturb(_: Any, args: tuple[Tensor], output: Tensor, inputs: Any = inputs, moves: Any = moves) -> Tensor:
            inputs.append(args[0].detach()[0])
            moves.append(torch.zeros_like(output, requires_grad=True))
            return output + moves[-1]

        handles = [layer.register_forward_hook(perturb) for layer in layers]
        deltas = torch.autograd.grad(_loss(model, block) * (len(block) - 1), moves)
        for handle in handles:
            handle.remove()
        pairs = zip(layers, inputs, deltas, strict=True)
        rows = [(x @ m.lora_A["default"].weight.detach().T, m.scaling["default"] * d[0], x) for m, x, d in pairs]
        for t in range(len(block) - 1):
            yield [(a[t], delta[t], x[t]) for a, delta, x in rows]


def test_replay_adds_a_batch_of_general_text_to_every_fifth_step(peers: ModuleType, start: PeftModel) -> None:
    replay = peers.PEERS["replay"](start, None, Path(), 0.2, 0)
    for step in range(4):
        replay.add_gradients(step)
    assert all(b.grad is None for _, b in _factors(start))
    replay.add_gradients(4)
    drawn = [BLOCKS[i % len(BLOCKS)] for i in range(peers.REPLAYED_BLOCKS)]
    for _, b in _factors(start):
        mean = sum(torch.autograd.grad(_loss(start, block), b)[0] for block in drawn) / len(drawn)
        torch.testing.assert_close(b.grad, mean)


def test_l2_is_the_gradient_of_the_squared_change_of_weights(
    peers: ModuleType, start: PeftModel, randomize: Callable[..., Any]
) -> None:
    model = randomize(start).double()
    added = _added(model, peers.PEERS["l2"](model, None, Path(), STRENGTH, 0))
    penalty = sum(0.5 * STRENGTH * (2.0 * b @ a).square().sum() for a, b in _factors(model))
    _assert_gradient_of(penalty, model, added)


@pytest.mark.parametrize("trained", [False, True])
def test_ewc_holds_each_weight_by_the_squares_of_the_blocks_gradients(
    peers: ModuleType, start: PeftModel, randomize: Callable[..., Any], trained: bool
) -> None:
    if trained:
        randomize(start).double()
    pairs = _factors(start)
    parameters = [p for pair in pairs for p in pair]
    before = [p.detach().clone() for p in parameters]
    blocks = [torch.autograd.grad(_loss(start, block) * 8, parameters) for block in BLOCKS]
    fisher = [sum(g.square() for g in of_one) / 24 for of_one in zip(*blocks, strict=True)]
    peer = peers.PEERS["ewc"](start, None, Path(), STRENGTH, 0)
    assert trained or not any(f.any() for f in fisher[::2])
    for parameter in parameters:
        parameter.data += torch.randn_like(parameter)
    terms = zip(parameters, before, fisher, strict=True)
    penalty = sum(0.5 * STRENGTH * (f * (p - old).square()).sum() for p, old, f in terms)
    _assert_gradient_of(penalty, start, _added(start, peer))


def test_lalora_diagonal_holds_b_by_the_squares_of_the_tokens_gradients(
    peers: ModuleType, start: PeftModel, randomize: Callable[..., Any]
) -> None:
    tokens = list(_tokens(start))
    peer = peers.PEERS["lalora_diag"](start, None, Path(), STRENGTH, 0)
    randomize(start).double()
    penalty = torch.zeros((), dtype=torch.float64)
    for layer, (_, b) in enumerate(_factors(start)):
        fisher = sum(torch.outer(token[layer][1], token[layer][0]).square() for token in tokens) / len(tokens)
        penalty = penalty + 0.5 * STRENGTH * (fisher * b.square()).sum()
    _assert_gradient_of(penalty, start, _added(start, peer))


def test_lalora_kfac_holds_b_by_a_kronecker_product_of_two_covariances(
    peers: ModuleType, start: PeftModel, randomize: Callable[..., Any]
) -> None:
    tokens = list(_tokens(start))
    peer = peers.PEERS["lalora_kfac"](start, None, Path(), STRENGTH, 0)
    randomize(start).double()
    penalty = torch.zeros((), dtype=torch.float64)
    for layer, (_, b) in enumerate(_factors(start)):
        s = sum(torch.outer(token[layer][0], token[layer][0]) for token in tokens) / len(tokens)
        g = sum(torch.outer(token[layer][1], token[layer][1]) for token in tokens) / len(tokens)
        penalty = penalty + 0.5 * STRENGTH * b.flatten() @ torch.kron(g, s) @ b.flatten()
    _assert_gradient_of(penalty, start, _added(start, peer))


def test_kfac_of_the_change_holds_both_factors_by_what_their_product_does(
    peers: ModuleType, start: PeftModel, randomize: Callable[..., Any]
) -> None:
    tokens = list(_tokens(start))
    peer = peers.PEERS["change_kfac"](start, None, Path(), STRENGTH, 0)
    randomize(start).double()
    penalty = torch.zeros((), dtype=torch.float64)
    for layer, (a, b) in enumerate(_factors(start)):
        s = sum(torch.outer(token[layer][2], token[layer][2]) for token in tokens) / len(tokens)
        g = sum(torch.outer(token[layer][1], token[layer][1]) for token in tokens) / len(tokens)
        penalty = penalty + 0.5 * STRENGTH * torch.trace((b @ a).T @ g @ (b @ a) @ s)
    _assert_gradient_of(penalty, start, _added(start, peer))


@pytest.mark.parametrize("name", NAMES)
def test_statistics_leave_no_gradient_and_no_hook_behind(peers: ModuleType, start: PeftModel, name: str) -> None:
    peers.PEERS[name](start, None, Path(), STRENGTH, 0)
    assert all(parameter.grad is None for parameter in start.parameters())
    assert not any(module._forward_hooks for module in start.modules())


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_trained_adapter_is_no_start(
    peers: ModuleType, start: PeftModel, randomize: Callable[..., Any], name: str
) -> None:
    with pytest.raises(ValueError, match="expected B = 0"):
        peers.PEERS[name](randomize(start).double(), None, Path(), STRENGTH, 0)


def test_intruders_are_reduced_in_place_in_float32(
    peers: ModuleType,
    make_tiny_llama: Callable[..., Any],
    lora_config: Callable[..., Any],
    randomize: Callable[..., Any],
) -> None:
    model = randomize(get_peft_model(make_tiny_llama(num_hidden_layers=1).bfloat16(), lora_config()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changes = [layer.get_delta_weight("default") for layer in peers.lora_layers(model).values()]
    peers.reduce_intruders(model, kept=1.0)
    for layer, change in zip(peers.lora_layers(model).values(), changes, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), change, rtol=0, atol=1e-5)
    peers.reduce_intruders(model, kept=0.0)
    assert not torch.allclose(layer.get_delta_weight("default"), change, rtol=0, atol=1e-3)
    after = model.state_dict()
    assert list(model.peft_config) == ["default"]
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name}
    for layer in peers.lora_layers(model).values():  # PEFT's edit kept what float32 can tell, not what bfloat16 can
        weight = layer.lora_B["default"].weight
        assert not torch.equal(weight, weight.bfloat16().float())


def test_general_text_is_wikitext_and_the_first_c4_documents_in_turn(
    module: ModuleType, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "wikitext2_valid.txt").write_text("w" * 400)
    documents = ["short", "a" * 200, "b" * 161, *["c" * 10] * (module.C4_DOCUMENTS - 3), "d" * 200]
    lines = "\n".join(json.dumps({"text": text}) for text in documents)
    (tmp_path / "prose" / "c4_demo.jsonl").write_text(lines)
    blocks = [tiny_tokenizer.decode(b) for b in itertools.islice(module.general_blocks(tiny_tokenizer, tmp_path, 0), 8)]
    assert all(len(block) == module.BLOCK for block in blocks)
    assert "".join(block[0] for block in blocks[::2]) == "wwww"
    assert {block[0] for block in blocks[1::2]} == {"a", "b"}
