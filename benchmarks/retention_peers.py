"""Peers of retention: ways to forget less that act while an adapter is trained, and PEFT's own edit of a trained one.

`PEERS[name](model, tokenizer, data, strength, seed)` makes one; `add_gradients(step)` is called after the backward pass of
the task's loss and before clipping. Penalties are ½ · strength · (a quadratic form in nats per general token), so strengths
of `ewc` and `lalora_*` are what a general token's nat is worth beside a task token's.

Notation per layer: ΔW = s·B A; a = A x; δ the gradient of the SUM of token losses at the layer's output; B₀ = 0 and A₀ are
what PEFT starts with. General text is read from the first documents of C4 and wikitext's validation part; what is measured
uses others.

LaLoRA (Sliwa et al., arXiv 2512.17720): a Laplace approximation of the loss on surrogate source data, over the LoRA weights
alone, at the start of training; its precision is the metric of a quadratic penalty in training, diagonal or block-diagonal
K-FAC. Only abstracts and summaries of it were at hand, not the paper: this is the method as its name and they define it, with
the empirical Fisher for the curvature. As B₀ = 0, every gradient of A is 0 there, and so are A's block and the block between
A and B (their block-tridiagonal variant is then the block-diagonal one): A moves freely, in `ewc` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor

from grit_lightning.forgetting.text import TextData

BLOCK = 160
"""Tokens of a block of general text."""
C4_DOCUMENTS = 200
"""C4 documents 250 to 299 measure."""
FISHER_BLOCKS = 48
REPLAYED_BLOCKS = 4
ADAPTER = "default"


class Replay:
    """Add the gradient of a batch of general text to every 1/strength-th step, with the weight of a task batch."""

    def __init__(self, model: PeftModel, tokenizer: Any, data: Path, strength: float, seed: int) -> None:
        """Draw general text from now on."""
        self.model, self.every = model, round(1 / strength)
        self.blocks = general_blocks(tokenizer, data, seed)

    def add_gradients(self, step: int) -> None:
        """Add the gradient of the mean loss."""
        if (step + 1) % self.every == 0:
            ids = torch.tensor([next(self.blocks) for _ in range(REPLAYED_BLOCKS)])
            self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


class L2:
    """Penalise ½ · strength · ‖s B A‖²_F, by products of r × r."""

    def __init__(self, model: PeftModel, tokenizer: Any, data: Path, strength: float, seed: int) -> None:
        """Take any weights: the penalty is of the change itself."""
        self.layers, self.strength = lora_layers(model), strength

    @torch.no_grad()
    def add_gradients(self, step: int) -> None:
        """Add s² B (A Aᵀ) to B's and s² (Bᵀ B) A to A's."""
        for layer in self.layers.values():
            a, b = factors(layer)
            weight = self.strength * layer.scaling[ADAPTER] ** 2
            (gradient_a, gradient_b) = (b.mT @ b) @ a, b @ (a @ a.mT)
            add(a, weight * gradient_a)
            add(b, weight * gradient_b)


class EWC:
    """Penalise ½ · strength · Σ F (θ − θ₀)² over A and B, with F of whole blocks: squares of each block's gradient.

    F is estimated at the start, where A's is 0.
    """

    def __init__(self, model: PeftModel, tokenizer: Any, data: Path, strength: float, seed: int) -> None:
        """Estimate F at the model's weights."""
        self.parameters = [p for layer in lora_layers(model).values() for p in factors(layer)]
        self.strength = strength
        self.start = [p.detach().clone() for p in self.parameters]
        self.fisher = [torch.zeros_like(p) for p in self.parameters]
        tokens = 0
        for count in each_block(model, tokenizer, data, seed):
            for fisher, parameter in zip(self.fisher, self.parameters, strict=True):
                fisher += parameter.grad.square()
            tokens += count
        for fisher in self.fisher:
            fisher /= tokens

    @torch.no_grad()
    def add_gradients(self, step: int) -> None:
        """Add F (θ − θ₀)."""
        for parameter, start, fisher in zip(self.parameters, self.start, self.fisher, strict=True):
            add(parameter, self.strength * fisher * (parameter - start))


class LaLoRADiagonal:
    """Penalise ½ · strength · Σ F B², with F of single tokens, as K-FAC has it: F_ij = s² E[δ_i² a_j²]."""

    def __init__(self, model: PeftModel, tokenizer: Any, data: Path, strength: float, seed: int) -> None:
        """Estimate F where B = 0."""
        self.layers, self.strength = starting_layers(model), strength
        self.fisher: dict[str, Tensor] = {}

        def collect(name: str, _: Tensor, a: Tensor, delta: Tensor) -> None:
            accumulate(self.fisher, name, delta.square().mT @ a.square())

        tokens = observe_tokens(model, tokenizer, data, seed, collect)
        for name, layer in self.layers.items():
            self.fisher[name] *= layer.scaling[ADAPTER] ** 2 / tokens

    @torch.no_grad()
    def add_gradients(self, step: int) -> None:
        """Add F B to B's."""
        for name, layer in self.layers.items():
            b = factors(layer)[1]
            add(b, self.strength * self.fisher[name] * b)


class LaLoRAKronecker:
    """Penalise ½ · strength · tr(Bᵀ G B S), G = s² E[δ δᵀ] `[d_out, d_out]`, S = E[a aᵀ] `[r, r]`, a = A₀ x."""

    def __init__(self, model: PeftModel, tokenizer: Any, data: Path, strength: float, seed: int) -> None:
        """Estimate G and S where B = 0."""
        self.layers, self.strength = starting_layers(model), strength
        self.output: dict[str, Tensor] = {}
        self.input: dict[str, Tensor] = {}

        def collect(name: str, _: Tensor, a: Tensor, delta: Tensor) -> None:
            accumulate(self.output, name, delta.mT @ delta)
            accumulate(self.input, name, a.mT @ a)

        tokens = observe_tokens(model, tokenizer, data, seed, collect)
        for name, layer in self.layers.items():
            self.output[name] *= layer.scaling[ADAPTER] ** 2 / tokens
            self.input[name] /= tokens

    @torch.no_grad()
    def add_gradients(self, step: int) -> None:
        """Add G B S to B's."""
        for name, layer in self.layers.items():
            b = factors(layer)[1]
            add(b, self.strength * self.output[name] @ (b @ self.input[name]))


class KFACOfChange:
    """Penalise ½ · strength · tr(ΔWᵀ G ΔW S), G = E[δ δᵀ] `[d_out, d_out]`, S = E[x xᵀ] `[d_in, d_in]`.

    Kronecker curvature of general text over the change of weights itself, as Porrello et al. (arXiv 2602.17385) have it for
    task vectors. It holds A as well and stays right while A moves, which the approximation over B around A₀ does not.
    """

    def __init__(self, model: PeftModel, tokenizer: Any, data: Path, strength: float, seed: int) -> None:
        """Estimate G and S of the backbone, where B = 0."""
        self.layers, self.strength = starting_layers(model), strength
        self.output: dict[str, Tensor] = {}
        self.input: dict[str, Tensor] = {}

        def collect(name: str, x: Tensor, _: Tensor, delta: Tensor) -> None:
            accumulate(self.output, name, delta.mT @ delta)
            accumulate(self.input, name, x.mT @ x)

        tokens = observe_tokens(model, tokenizer, data, seed, collect)
        for name in self.layers:
            self.output[name] /= tokens
            self.input[name] /= tokens

    @torch.no_grad()
    def add_gradients(self, step: int) -> None:
        """Add s² G B (A S Aᵀ) to B's and s² (Bᵀ G B) A S to A's."""
        for name, layer in self.layers.items():
            a, b = factors(layer)
            heard, sent = a @ self.input[name], self.output[name] @ b
            weight = self.strength * layer.scaling[ADAPTER] ** 2
            add(a, weight * (b.mT @ sent) @ heard)
            add(b, weight * sent @ (heard @ a.mT))


PEERS: dict[str, Callable[[PeftModel, Any, Path, float, int], Any]] = {
    "replay": Replay,
    "l2": L2,
    "ewc": EWC,
    "lalora_diag": LaLoRADiagonal,
    "lalora_kfac": LaLoRAKronecker,
    "change_kfac": KFACOfChange,
}


def reduce_intruders(model: PeftModel, kept: float = 0.75, top_k: int = 10, threshold: float = 0.5) -> None:
    """Edit a trained adapter in place by PEFT's `reduce_intruder_dimension`.

    The backbone's layers are float32 meanwhile, as PEFT would round the edited adapter to their dtype.

    Args:
        model: Has one LoRA adapter.
        kept: What part of each intruding direction of W + ΔW stays; PEFT's default for its `mitigation_lambda`, whose
            documentation calls it the part that goes: its code takes 1 − λ of the direction off.
        top_k: Leading directions of W + ΔW that are looked at; PEFT's default.
        threshold: Cosine to every direction of W below which a direction intrudes; PEFT's default.
    """
    layers = lora_layers(model)
    dtypes = {name: layer.get_base_layer().weight.dtype for name, layer in layers.items()}
    for layer in layers.values():
        layer.get_base_layer().weight.data = layer.get_base_layer().weight.data.float()
    reduce_intruder_dimension(
        model,
        old_adapter_name=ADAPTER,
        new_adapter_name="reduced",
        top_k=top_k,
        threshold_epsilon=threshold,
        mitigation_lambda=kept,
        logging_sink=None,
    )
    for name, layer in layers.items():
        for matrices in (layer.lora_A, layer.lora_B):
            matrices[ADAPTER].weight.data.copy_(matrices["reduced"].weight.data)
        layer.get_base_layer().weight.data = layer.get_base_layer().weight.data.to(dtypes[name])
    model.set_adapter(ADAPTER)
    model.delete_adapter("reduced")


def general_blocks(tokenizer: Any, data: Path, seed: int) -> Iterator[list[int]]:
    """Yield blocks of wikitext and C4 in turn, in an order of their own, without end."""
    prose = data / "prose"
    wikitext = TextData(str(prose / "wikitext2_valid.txt"), separator="\n").read(tokenizer, BLOCK)
    c4 = TextData(str(prose / "c4_demo.jsonl"), documents="separate").read(tokenizer, BLOCK, C4_DOCUMENTS)
    sources = [[block.ids for block in source.sequences if len(block.ids) == BLOCK] for source in (wikitext, c4)]
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(blocks), generator=generator).tolist() for blocks in sources]
    drawn = 0
    while True:
        for blocks, order in zip(sources, orders, strict=True):
            yield blocks[order[drawn % len(order)]]
        drawn += 1


def each_block(model: PeftModel, tokenizer: Any, data: Path, seed: int) -> Iterator[int]:
    """Have the gradients of the sum of token losses of one block of general text at a time; yield its tokens."""
    blocks = general_blocks(tokenizer, data, seed)
    for _ in range(FISHER_BLOCKS):
        ids = torch.tensor([next(blocks)])
        tokens = ids.shape[1] - 1
        (model(input_ids=ids, labels=ids, use_cache=False).loss * tokens).backward()
        yield tokens
        model.zero_grad()


def observe_tokens(
    model: PeftModel, tokenizer: Any, data: Path, seed: int, collect: Callable[[str, Tensor, Tensor, Tensor], None]
) -> int:
    """Call `collect` with each layer's name, x `[T, d_in]`, a `[T, r]` and δ `[T, d_out]`, a block at a time; count tokens."""
    with observing(lora_layers(model), collect):
        return sum(each_block(model, tokenizer, data, seed))


@contextmanager
def observing(layers: dict[str, LoraLayer], collect: Callable[[str, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Watch the layers' x and a in the forward pass and δ in the backward pass."""
    handles = []

    def watch(name: str, layer: LoraLayer) -> None:
        seen: list[Tensor] = []
        exact = factors(layer)[0].dtype

        def rows(values: Tensor) -> Tensor:
            return values.detach()[:, :-1].flatten(0, -2).to(exact)  # the last token predicts nothing

        def keep_inputs(_: Any, inputs: tuple[Tensor], a: Tensor) -> None:
            seen[:] = rows(inputs[0]), rows(a)

        def keep_delta(_: Any, __: Any, output: Tensor) -> None:
            output.register_hook(lambda delta: collect(name, *seen, rows(delta)))

        handles.append(layer.lora_A[ADAPTER].register_forward_hook(keep_inputs))
        handles.append(layer.register_forward_hook(keep_delta))

    for name, layer in layers.items():
        watch(name, layer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Find the adapted layers, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def starting_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Find the adapted layers of a model that has not been trained."""
    layers = lora_layers(model)
    for name, layer in layers.items():
        if factors(layer)[1].any():
            raise ValueError(f"{name}: expected B = 0, got a trained adapter. Approximate at the start of training.")
    return layers


def factors(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """Return A `[r, d_in]` and B `[d_out, r]`."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def add(parameter: Tensor, gradient: Tensor) -> None:
    """Add to a parameter's gradient, which need not exist yet."""
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def accumulate(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add to a sum, which need not exist yet."""
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value
