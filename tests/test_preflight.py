"""What is found before a weight or a row is read, under a Trainer and alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from peft import BOFTConfig, IA3Config, LoraConfig, PrefixTuningConfig
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import grit_lightning.module
from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.evaluation.generation import GenerationSettings
from grit_lightning.preflight import require_adapter_fits, require_data_fits

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}


class Rows(pl.LightningDataModule):
    """Counts what is asked of it, and knows its tokenizer and its longest row."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batches: Any = (), max_length: int | None = 128) -> None:
        super().__init__()
        self.tokenizer, self.batches, self.max_length = tokenizer, batches, max_length
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append("setup")

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = train_dataloader


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def make(**overrides: Any) -> pl.Trainer:
        settings: dict[str, Any] = {"accelerator": "cpu", "max_steps": 1, "default_root_dir": tmp_path}
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        return pl.Trainer(**(settings | dict.fromkeys(quiet, False) | overrides))

    return make


@pytest.fixture
def weights_read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every call that reads weights."""
    calls: list[Any] = []
    load = grit_lightning.module.load_backbone

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return load(*args, **options)

    monkeypatch.setattr(grit_lightning.module, "load_backbone", counted)
    return calls


@pytest.fixture
def unreadable(tiny_backbone_dir: Path, tmp_path: Path) -> Path:
    """A backbone's folder whose weights cannot be read."""
    (tmp_path / "config.json").write_bytes((tiny_backbone_dir / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"never opened")
    return tmp_path


LORA: dict[str, Any] = {"target_modules": ["q_proj"], **CAUSAL}
WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"adapter": LoraConfig(target_modules=["q_prj"], **CAUSAL)}, {}, r"^adapter\.target_modules: .*mean q_proj"),
    ({"adapter": LoraConfig(r=-1, **LORA)}, {}, r"^adapter\.r: expected a positive rank"),
    ({"adapter": LoraConfig(init_lora_weights="corda", corda_config={}, **LORA)}, {}, r"^adapter\.init_lora_weights: "),
    ({"adapter": LoraConfig(use_dora=True, **LORA)}, {}, "expected a plain linear LoRA layer, got Linear Dora"),
    ({"adapter": IA3Config(target_modules=["k_proj"], feedforward_modules=[], **CAUSAL)}, {}, r"^model\.geometry: "),
    ({"adapter": LoraConfig(**LORA), "dtype": "fp32"}, {}, "^dtype: expected one of"),
    ({"adapter": LoraConfig(**LORA)}, {"max_length": 129}, r"at most 128 tokens, .* got 129 .* Lower data\.max_length"),
]


@pytest.mark.parametrize(
    ("settings", "data", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_does_not_fit_is_found_before_rows_and_weights_are_read(
    unreadable: Path,
    tiny_tokenizer: Any,
    trainer: Callable[..., pl.Trainer],
    weights_read: list[Any],
    settings: dict[str, Any],
    data: dict[str, Any],
    message: str,
) -> None:
    rows = Rows(tiny_tokenizer, **data)
    for start in ("fit", "validate", "test"):
        with pytest.raises(ValueError, match=message):
            getattr(trainer(), start)(GritLitModule(backbone=str(unreadable), **settings), datamodule=rows)
    assert rows.calls == []
    assert weights_read == []


def test_a_strategy_that_may_split_the_adapter_is_found_as_early(
    unreadable: Path, tiny_tokenizer: Any, trainer: Callable[..., pl.Trainer], weights_read: list[Any]
) -> None:
    class Splitting(SingleDeviceStrategy):
        """Taken for one of those that are neither DDP's nor of a single device."""

        __class__ = FSDPStrategy  # type: ignore[assignment]

    rows, run = Rows(tiny_tokenizer), trainer(strategy=Splitting("cpu"))
    with pytest.raises(
        MisconfigurationException, match=r"^trainer\.strategy: expected one that keeps the adapter whole"
    ):
        run.fit(GritLitModule(backbone=str(unreadable), adapter=LoraConfig(**LORA)), datamodule=rows)
    assert rows.calls == []
    assert weights_read == []


def test_what_fits_is_read_once_and_starts_from_the_same_random_numbers(
    tiny_backbone_dir: Path,
    tiny_tokenizer: Any,
    random_batch: Callable[..., Any],
    trainer: Callable[..., pl.Trainer],
    weights_read: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def factors() -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        module = GritLitModule(backbone=str(tiny_backbone_dir), adapter=LoraConfig(**LORA))
        run = trainer()
        run.fit(module, datamodule=Rows(tiny_tokenizer, [random_batch()]))
        run.validate(module, datamodule=Rows(tiny_tokenizer, [random_batch()]))
        return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    checked = factors()
    assert len(weights_read) == 1
    monkeypatch.setattr(GritLitModule, "configure_callbacks", lambda self: [])
    unchecked = factors()
    assert all(torch.equal(value, unchecked[name]) for name, value in checked.items())


def test_random_numbers_that_a_method_draws_are_drawn_again(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []

    def draw(*args: Any) -> None:
        drawn.append(torch.rand(1, device="cpu"))
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    monkeypatch.setattr("grit_lightning.preflight.attach_adapter", draw)
    require_adapter_fits(options_of(tiny_llama), LoraConfig(**LORA), geometry=False, generation=False)
    assert torch.equal(torch.rand(1), drawn[0])


def options_of(source: Any) -> dict[str, Any]:
    return {"source": source, "dtype": "float32", "quantization": None, "revision": None}


def test_a_model_in_memory_is_checked_without_being_touched(tiny_llama: LlamaForCausalLM) -> None:
    before = [name for name, _ in tiny_llama.named_modules()]
    model = require_adapter_fits(options_of(tiny_llama), LoraConfig(**LORA), geometry=True, generation=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert [name for name, _ in tiny_llama.named_modules()] == before


def test_a_method_that_computes_with_the_weights_is_left_for_later(tiny_llama: LlamaForCausalLM) -> None:
    adapter = BOFTConfig(target_modules=["q_proj"], boft_block_size=4, **CAUSAL)
    model = require_adapter_fits(options_of(tiny_llama), adapter, geometry=False, generation=False)
    with pytest.raises(ValueError, match=r"data\.max_length"):
        require_data_fits(model, Rows(None, max_length=129))  # type: ignore[arg-type]


def test_a_prefix_takes_its_place_in_the_context_and_generates_nothing(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: Any
) -> None:
    prefix = PrefixTuningConfig(num_virtual_tokens=8, **CAUSAL)
    model = require_adapter_fits(options_of(tiny_llama), prefix, geometry=False, generation=False)
    require_data_fits(model, Rows(tiny_tokenizer, max_length=120))
    with pytest.raises(ValueError, match="at most 120 tokens"):
        require_data_fits(model, Rows(tiny_tokenizer, max_length=121))
    with pytest.raises(ValueError, match=r"^model\.generation: expected null"):
        require_adapter_fits(options_of(tiny_llama), prefix, geometry=False, generation=True)
    with pytest.raises(ValueError, match=r"^model\.geometry: expected null, .* PrefixTuningConfig"):
        require_adapter_fits(options_of(tiny_llama), prefix, geometry=True, generation=False)


def test_generation_is_known_to_the_check_of_a_module(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: Any, trainer: Callable[..., pl.Trainer]
) -> None:
    module = GritLitModule(
        backbone=tiny_llama,
        adapter=PrefixTuningConfig(num_virtual_tokens=8, **CAUSAL),
        geometry=None,
        generation=GenerationSettings(),
    )
    with pytest.raises(ValueError, match=r"^model\.generation: expected null"):
        trainer().test(module, datamodule=Rows(tiny_tokenizer))


# Tokens and embeddings.


def test_a_tokenizer_larger_than_the_embeddings_is_refused_with_both_numbers(
    make_tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: Any
) -> None:
    require_data_fits(make_tiny_llama(vocab_size=260), Rows(tiny_tokenizer))
    with pytest.raises(ValueError, match=r"^data\.tokenizer: expected .*, which has 259, got one with 260 tokens"):
        require_data_fits(make_tiny_llama(vocab_size=259), Rows(tiny_tokenizer))


def test_the_tokenizer_of_a_mixture_is_that_of_its_first_task(
    make_tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: Any
) -> None:
    mixture: Any = pl.LightningDataModule()
    mixture.tasks = {"one": Rows(tiny_tokenizer)}
    with pytest.raises(ValueError, match=r"^data\.tokenizer"):
        require_data_fits(make_tiny_llama(vocab_size=259), mixture)


@pytest.mark.parametrize("use", ["chat_template", "eos_token", "pad_token"])
def test_an_added_token_without_an_embedding_is_refused_once_it_is_used(
    make_tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: Any, use: str
) -> None:
    model = make_tiny_llama(vocab_size=260)
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    require_data_fits(model, Rows(tiny_tokenizer))  # Gemma 3 has one for images, which no text comes to
    setattr(tiny_tokenizer, use, "{{ bos_token }}<image>" if use == "chat_template" else "<image>")
    with pytest.raises(ValueError, match="which has 260, got one with 261 tokens"):
        require_data_fits(model, Rows(tiny_tokenizer))


def test_data_that_knows_neither_tokenizer_nor_length_is_taken(tiny_llama: LlamaForCausalLM) -> None:
    require_data_fits(tiny_llama, None)
    require_data_fits(tiny_llama, object())


# A model without weights.


@pytest.mark.parametrize("geometry", [None, GeometryConfig()], ids=["plain", "geometry"])
@pytest.mark.parametrize("where", ["meta", "empty_init"])
@pytest.mark.parametrize("in_memory", [True, False], ids=["instance", "folder"])
def test_parameters_are_counted_without_weights_and_the_module_trains_afterwards(
    tiny_llama: LlamaForCausalLM,
    tiny_backbone_dir: Path,
    tiny_tokenizer: Any,
    random_batch: Callable[..., Any],
    trainer: Callable[..., pl.Trainer],
    weights_read: list[Any],
    geometry: GeometryConfig | None,
    where: str,
    in_memory: bool,
) -> None:
    source = tiny_llama if in_memory else str(tiny_backbone_dir)
    module = GritLitModule(backbone=source, adapter=LoraConfig(r=4, **LORA), geometry=geometry)
    with torch.device("meta") if where == "meta" else trainer().init_module(empty_init=True):
        module.configure_model()
        module.configure_model()
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 2 * (4 * 32 + 32 * 4)
    assert weights_read == []
    trainer().fit(module, datamodule=Rows(tiny_tokenizer, [random_batch()]))
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert len(weights_read) == 1


def test_a_refusal_after_counting_is_still_the_sentence(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: Any, trainer: Callable[..., pl.Trainer]
) -> None:
    module = GritLitModule(backbone=tiny_llama, adapter=LoraConfig(**LORA))
    with torch.device("meta"):
        module.configure_model()
    with pytest.raises(ValueError, match="at most 128 tokens"):  # and not that Lightning cannot move a meta tensor
        trainer().fit(module, datamodule=Rows(tiny_tokenizer, max_length=129))
