"""Shared fixtures: a seeded tiny Llama and its geometry, a byte-level tokenizer that fits it, random batches with padding."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so it has to come before every other import
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import logging

# PEFT imports bitsandbytes, which says on some processors that an optional kernel, of no use in training, is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import copy
import functools
import itertools
import signal
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import registry
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grit_lightning import GeometryConfig, RankSpaceGeometry

VOCAB_SIZE = 320  # 4 special tokens and 256 bytes, rounded up
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0, 1, 2, 3


def pytest_configure(config: pytest.Config) -> None:
    """Lists the warnings that are let through although warnings are errors, each with its reason."""
    # PEFT asks the model for a property that transformers 5.2x renamed; nothing that a caller of PEFT could change.
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
    # A shell's background jobs and nohup hand ignored signals down, which a run respects; the tests send them.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(autouse=True, scope="session")
def _no_time_lost() -> Iterator[None]:
    """Look for Lightning's plugins once, not for every Trainer, and load models of a few tensors in this thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", functools.cache(entry_points), raising=False)
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
        yield


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).float()


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
    )


@pytest.fixture(scope="session")
def make_tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """A factory: every call gives a fresh float32 Llama with the same weights; keywords override its LlamaConfig."""
    return _tiny_llama


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """One tiny Llama: 2 layers, hidden 32, intermediate 64, 4 heads, 2 key/value heads, 320 tokens, context 128."""
    return _tiny_llama()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, so that any text tokenises and decodes back; pad, bos, eos, unk are ids 0 to 3."""
    return _byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the tiny Llama and its tokenizer as `save_pretrained` writes them. Read it, do not write."""
    folder = tmp_path_factory.mktemp("tiny_backbone")
    _tiny_llama().save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lora_config() -> Callable[..., LoraConfig]:
    """A factory of a LoRA on q_proj and v_proj, rank 4, alpha 8, no dropout; keywords override."""

    def make(**overrides: Any) -> LoraConfig:
        settings: dict[str, Any] = {
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
        }
        return LoraConfig(**(settings | overrides))

    return make


def _randomize(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def randomize() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Gives both factors of every layer seeded random values, as after some training, so that B ≠ 0."""
    return _randomize


@pytest.fixture
def make_geometry(lora_config: Callable[..., LoraConfig]) -> Callable[..., tuple[PeftModel, RankSpaceGeometry]]:
    """`make_geometry(kfac_update_freq=1)`: an adapted tiny Llama with B ≠ 0, and its geometry with these settings.

    `adapter` and `llama` are dicts that override its LoRA and Llama configurations.
    """

    def make(
        adapter: dict[str, Any] | None = None, llama: dict[str, Any] | None = None, **settings: Any
    ) -> tuple[PeftModel, RankSpaceGeometry]:
        model = get_peft_model(_tiny_llama(**(llama or {})), lora_config(**(adapter or {})))
        _randomize(model)
        return model, RankSpaceGeometry(model, GeometryConfig(**settings))

    return make


@pytest.fixture
def random_batch() -> Callable[..., dict[str, torch.Tensor]]:
    """A factory of batches: input_ids, attention_mask and labels, each [batch, length] and long.

    `pad` is the number of padding tokens at the end of every row, or one number a row; padding has id 0, attention 0
    and label -100. `prompt` tokens at the start of every row are attended to but not learnt.
    """

    def make(
        batch: int = 2,
        length: int = 16,
        vocab: int = VOCAB_SIZE,
        pad: int | list[int] = 0,
        prompt: int = 0,
        seed: int = 0,
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(len(SPECIAL_TOKENS), vocab, (batch, length), generator=generator)
        padding = torch.tensor([pad] * batch if isinstance(pad, int) else pad)
        position = torch.arange(length)
        real = position[None, :] < length - padding[:, None]
        learnt = real & (position[None, :] >= prompt)
        return {
            "input_ids": input_ids.masked_fill(~real, 0),
            "attention_mask": real.long(),
            "labels": input_ids.masked_fill(~learnt, -100),
        }

    return make


Batch = dict[str, torch.Tensor]
Covariances = dict[str, tuple[torch.Tensor, torch.Tensor]]


def _documents(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels of every document: the real tokens of a row, cut where `position_ids` restart."""
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][real], batch["labels"][row][real]
        positions = batch["position_ids"][row][real] if "position_ids" in batch else torch.arange(len(ids))
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            yield ids[start:end], labels[start:end]


def _truth(model: torch.nn.Module, batches: list[Batch], seed: int = 0) -> Covariances:
    """Keeps the full input x and output gradient δ of every adapted layer, in float64, one unpadded document at a time,
    and forms a = A x and g = s·Bᵀδ itself. It shares no code with the package.
    """
    model = copy.deepcopy(model).double()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and module.active_adapters[0] in module.lora_A
    }
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    deltas: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for name, layer in layers.items():
        for hooks in (layer._forward_hooks, layer.lora_A[layer.active_adapters[0]]._forward_hooks):
            hooks.clear()  # those of the geometry under test, which deepcopy has copied too

        def keep_input(module: torch.nn.Module, args: Any, name: str = name) -> None:
            inputs[name].append(args[0].detach().flatten(0, -2))

        def keep_delta(module: torch.nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
            output.register_hook(lambda delta: deltas[name].append(delta.detach().flatten(0, -2)))

        layer.lora_A[layer.active_adapters[0]].register_forward_pre_hook(keep_input)  # behind lora_dropout
        layer.register_forward_hook(keep_delta)
    torch.manual_seed(seed)
    for batch in batches:
        for ids, labels in _documents(batch):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100).backward()
    covariances = {}
    for name, layer in layers.items():
        adapter = layer.active_adapters[0]
        a = torch.cat(inputs[name]) @ layer.lora_A[adapter].weight.detach().T
        g = layer.scaling[adapter] * torch.cat(deltas[name]) @ layer.lora_B[adapter].weight.detach()
        covariances[name] = (a.T @ a / len(a), g.T @ g / len(g))
    return covariances


@pytest.fixture
def truth() -> Callable[..., Covariances]:
    """`truth(model, batches)`: Σ_a and Σ_g of every layer by name, float64."""
    return _truth


# An adapter on a tiny Llama with something to forget: trained by a plain loop on one kind of rows, the backbone on another.

Rows = list[dict[str, list[int]]]


def _counting_rows(count: int, seed: int, low: int, high: int, length: int = 12, prompt: int = 3) -> Rows:
    """Rows that count up or down from a random start within [low, high): something a model can learn."""
    generator = torch.Generator().manual_seed(seed)
    made: Rows = []
    for index in range(count):
        start, step = torch.randint(0, high - low, (2,), generator=generator).tolist()
        extra = index % 3
        ids = [low + (start + (1 + step % 3) * i) % (high - low) for i in range(length + extra)]
        ids[:2] = (low + torch.randint(0, high - low, (2,), generator=generator)).tolist()  # no two rows are the same
        made.append({"input_ids": ids, "learnt": [prompt, length + extra]})
    return made


def _train_plainly(model: Any, data: Rows, steps: int, lr: float) -> None:
    """A plain loop, without anything of this package."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for step in range(steps):
        chosen = [data[(4 * step + i) % len(data)] for i in range(4)]
        length = min(len(row["input_ids"]) for row in chosen)
        ids = torch.tensor([row["input_ids"][:length] for row in chosen])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def knowing_backbone(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_dir: Path) -> Path:
    """A folder with a tiny Llama that has learnt general rows."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(tiny_backbone_dir)
    _train_plainly(model, _counting_rows(64, 1, 10, 40), 60, 1e-2)
    folder = tmp_path_factory.mktemp("knowing_backbone")
    model.save_pretrained(folder)
    for file in Path(tiny_backbone_dir).glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory, knowing_backbone: Path) -> Path:
    """A PEFT folder with an adapter that has learnt the task, and forgotten some of what the backbone knew."""
    torch.manual_seed(0)
    backbone = LlamaForCausalLM.from_pretrained(knowing_backbone)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(backbone, config)
    _train_plainly(model, _counting_rows(48, 2, 30, 80), 40, 2e-2)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def adapted(knowing_backbone: Path, adapter_dir: Path) -> PeftModel:
    """The trained adapter in its model."""
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(knowing_backbone), str(adapter_dir))


@pytest.fixture(scope="session")
def task_rows() -> Callable[[int, int], Rows]:
    """A factory of rows of the task, from a count and a seed."""
    return lambda count, seed: _counting_rows(count, seed, 30, 80)


@pytest.fixture(scope="session")
def general_rows() -> Callable[[int, int], Rows]:
    """A factory of rows of what the backbone knew, from a count and a seed."""
    return lambda count, seed: _counting_rows(count, seed, 10, 40, prompt=1)
