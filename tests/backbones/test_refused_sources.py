"""What is not loaded: missing, pickled, incomplete and foreign sources, each with what to change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from grit_lightning.backbones.adapters import attach_adapter
from grit_lightning.backbones.loading import load_backbone, load_tokenizer


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere", "a/b/c", "nowhere.gguf", Path("x")])
def test_missing_path_names_the_place_and_the_setting(name: str | Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"a path that exists, got .*, which is /.*Set backbone to a hub id"
    ) as caught:
        load_backbone(name)
    assert str(Path(name).expanduser().absolute()) in str(caught.value)


@pytest.mark.parametrize("load", [load_backbone, load_tokenizer])
def test_unreachable_hub_says_what_was_tried(load: Callable[[str], Any]) -> None:
    with pytest.raises(
        OSError, match=r"expected a local folder /.*/acme/none, or 'acme/none' in .* hub, got neither"
    ) as caught:
        load("acme/none")
    assert "HF_HUB_OFFLINE is set" in str(caught.value)
    assert "Set backbone to a hub id" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("name", ["pypi:not_installed_at_all", "pypi:not_installed.at_all", "pypi:"])
def test_package_that_is_not_installed(name: str) -> None:
    with pytest.raises(
        ModuleNotFoundError, match="expected a package that is installed in this environment, got 'pypi:"
    ):
        load_backbone(name)


def test_single_module_is_no_package() -> None:
    with pytest.raises(
        ValueError, match="expected a package with files in it, got 'pypi:this', which is a single module"
    ):
        load_backbone("pypi:this")


@pytest.mark.parametrize("source", [3, None, nn.Linear(2, 2)])
def test_source_of_another_type(source: Any) -> None:
    with pytest.raises(TypeError, match=f"PreTrainedModel, got {type(source).__name__}"):
        load_backbone(source)


def test_empty_name() -> None:
    with pytest.raises(ValueError, match="expected a name or path, got an empty name"):
        load_backbone(" ")


def test_pickled_weights_are_refused_unread(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_backbone_dir / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ValueError, match=r"expected \*.safetensors .* got only pickled weights \(pytorch_model.bin\)"):
        load_backbone(tmp_path)


def test_pickled_weights_of_a_hub_repository_are_not_read(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, fill_hub_cache: Callable[[Path, Path], None]
) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    tiny_llama.config.save_pretrained(folder)
    torch.save(tiny_llama.state_dict(), folder / "pytorch_model.bin")
    fill_hub_cache(tmp_path / "cache", folder)
    with pytest.raises(OSError, match=r"Cannot load the backbone.*safetensors"):
        load_backbone("acme/tiny")


def test_folder_without_weights_lists_what_it_found(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_backbone_dir / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected weights, .* got config.json\."):
        load_backbone(tmp_path)


def test_folder_without_config_is_an_error_of_ours(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_backbone_dir / "model.safetensors", tmp_path)
    with pytest.raises(OSError, match="Cannot load the backbone") as caught:
        load_backbone(tmp_path)
    assert caught.value.__cause__ is not None


def test_weights_that_are_missing_are_never_made_up(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_backbone_dir, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for quantization in (None, "nf4"):
        with pytest.raises(
            OSError, match=r"got all but 2: model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight"
        ):
            load_backbone(tmp_path, quantization=quantization)


def test_folder_of_an_adapter(tiny_llama: LlamaForCausalLM, lora_config: Any, tmp_path: Path) -> None:
    attach_adapter(tiny_llama, lora_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected the folder of a whole model, got .*, which holds an adapter"):
        load_backbone(tmp_path)


def test_several_gguf_files(tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=r"with one GGUF file, got .* with \['one.gguf', 'two.gguf'\]\. Set backbone to"
    ):
        load_backbone(tmp_path)


def test_file_that_is_not_gguf(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got .*, which is not a \.gguf file"):
        load_backbone(tiny_backbone_dir / "model.safetensors")
    (tmp_path / "fake.gguf").write_bytes(b"not really a model file" * 10)
    with pytest.raises(OSError, match=r"expected files in .*fake\.gguf that can be read, got an error"):
        load_backbone(tmp_path / "fake.gguf")


def test_code_of_a_repository_is_never_run(tiny_backbone_dir: Path, tmp_path: Path) -> None:
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


def test_revision_of_a_local_source(tiny_backbone_dir: Path) -> None:
    for load in (load_backbone, load_tokenizer):
        with pytest.raises(ValueError, match=r"revision: expected null, as only hub ids .*, got 'main'"):
            load(tiny_backbone_dir, revision="main")


def test_unknown_dtype_and_quantization(tiny_backbone_dir: Path) -> None:
    with pytest.raises(ValueError, match="dtype: expected one of auto, float32, bfloat16, float16, got 'fp32'"):
        load_backbone(tiny_backbone_dir, dtype="fp32")
    with pytest.raises(ValueError, match="quantization: expected nf4 or null, got 'int8'"):
        load_backbone(tiny_backbone_dir, quantization="int8")
