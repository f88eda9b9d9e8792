"""Export: plain PEFT and transformers compute what the trained model computes, from less, and mistakes leave nothing.

Tolerance: both sides run the same float32 formula on the same numbers. Only the order of the sums over the rank differs,
which moves logits of size 1 by some 1e-7; 1e-5 leaves room for other kernels, and every fault below moves them by 1e-2.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from peft import AdaLoraConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.cli.program import main
from grit_lightning.export.adapter import export_adapter
from grit_lightning.export.compaction import alpha_for, compact

ATOL = 1e-5
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Make = Callable[..., GritLitModule]


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    prefix = "base_model.model."
    return {name.removeprefix(prefix): m for name, m in model.named_modules() if getattr(m, "lora_A", None)}


def _give_ranks(module: GritLitModule, rank_of: Callable[[int, str, int], int]) -> dict[str, int]:
    """Sets B to noise in the first columns of each layer and to zero beyond, as training at these ranks would."""
    ranks = {}
    for index, (name, layer) in enumerate(_lora_layers(module.peft_model).items()):
        b = layer.lora_B["default"].weight.data
        ranks[name] = rank_of(index, name, b.shape[1])
        b.normal_(std=0.3)
        b[:, ranks[name] :] = 0.0
    if module.geometry is not None:
        for group in module.geometry.groups:
            for index, site in enumerate(group.sites):
                group.ranks[index] = max(ranks[site.name.removeprefix("base_model.model.")], 1)
    return ranks


def _uneven(index: int, name: str, r: int) -> int:
    return 1 + index % r


def _save(module: GritLitModule, path: Path, global_step: int = 7) -> Path:
    """Writes the checkpoint that a Trainer would write after `global_step` optimizer steps."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    content["global_step"] = global_step
    torch.save(content, path)
    return path


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


@pytest.fixture
def make_module(tiny_backbone_dir: Path, lora_config: Callable[..., LoraConfig]) -> Make:
    """A factory of built modules on the tiny Llama with uneven effective ranks; keywords go to the LoraConfig."""

    def make(
        rank_of: Callable[[int, str, int], int] = _uneven, quantization: str | None = None, **lora: Any
    ) -> GritLitModule:
        module = GritLitModule(str(tiny_backbone_dir), lora_config(**lora), dtype="float32", quantization=quantization)
        module.configure_model()
        _give_ranks(module, rank_of)
        return module

    return make


@pytest.fixture
def checkpoint(make_module: Make, tmp_path: Path) -> Path:
    return _save(make_module(), tmp_path / "trained.ckpt")


@pytest.fixture
def batch(random_batch: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    return random_batch(pad=[0, 3])


# The function stays, the size shrinks.

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16},
    "alpha that no rank divides": {"r": 7, "lora_alpha": 5},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True},
    "source patterns": {"r": 4, "rank_pattern": {"q_proj": 8, "1.mlp.up_proj": 3}, "alpha_pattern": {"v_proj": 1}},
    "rslora and source patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 7},
        "alpha_pattern": {"o_proj": 3},
        "use_rslora": True,
    },
    "regular expression": {"r": 4, "target_modules": r".*\.1\..*(q|v)_proj"},
    "all-linear": {"r": 4, "target_modules": "all-linear"},
}


@pytest.mark.parametrize("lora", ADAPTERS.values(), ids=ADAPTERS.keys())
@pytest.mark.parametrize("from_checkpoint", [True, False], ids=["checkpoint", "module"])
def test_plain_peft_computes_what_the_trained_model_computes(
    lora: dict[str, Any],
    from_checkpoint: bool,
    make_module: Make,
    tiny_llama: LlamaForCausalLM,
    batch: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    module = make_module(**({"target_modules": ALL_LINEAR} | lora))
    assert module.geometry is not None
    trained = {name: layer.scaling["default"] for name, layer in _lora_layers(module.peft_model).items()}
    ranks = module.geometry.ranks
    export_adapter(_save(module, tmp_path / "c.ckpt") if from_checkpoint else module, tmp_path / "out")

    plain = _logits(tiny_llama, batch)
    loaded = PeftModel.from_pretrained(tiny_llama, tmp_path / "out")
    expected = _logits(module.peft_model, batch)
    assert (expected - plain).abs().max() > 1e-2, "an adapter that does nothing would prove nothing"
    torch.testing.assert_close(_logits(loaded, batch), expected, atol=ATOL, rtol=0)

    layers = _lora_layers(loaded)
    for name, layer in layers.items():
        assert torch.tensor(layer.scaling["default"]).equal(torch.tensor(trained[name])), "the same float32"
    assert {
        f"base_model.model.{name}": layer.lora_A["default"].weight.shape[0] for name, layer in layers.items()
    } == ranks
    assert len(set(ranks.values())) > 1

    torch.testing.assert_close(_logits(loaded.merge_and_unload(), batch), expected, atol=ATOL, rtol=0)


def test_peft_alone_in_a_process_of_its_own(
    checkpoint: Path, make_module: Make, batch: dict[str, Tensor], tiny_backbone_dir: Path, tmp_path: Path
) -> None:
    """The process never imports this package, and PEFT has nothing to warn about."""
    export_adapter(checkpoint, tmp_path / "out")
    module = GritLitModule.load_from_checkpoint(checkpoint, weights_only=True)
    save_file({"input_ids": batch["input_ids"], "mask": batch["attention_mask"]}, tmp_path / "in.safetensors")
    program = f"""
import sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}).eval()  # finds the backbone by itself
inputs = load_file({str(tmp_path / "in.safetensors")!r})
logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["mask"]).logits.detach()
assert not [name for name in sys.modules if name.partition(".")[0] == "grit_lightning"]
save_file({{"logits": logits.contiguous()}}, {str(tmp_path / "result.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    module.configure_model()
    torch.testing.assert_close(
        load_file(tmp_path / "result.safetensors")["logits"], _logits(module.peft_model, batch), atol=ATOL, rtol=0
    )


def test_file_and_parameters_shrink_to_the_effective_ranks(
    make_module: Make, tiny_llama: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = make_module(rank_of=lambda index, name, r: 2, r=16, target_modules=ALL_LINEAR)
    module.peft_model.save_pretrained(str(tmp_path / "full"))
    adapter = export_adapter(module, tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny_llama, tmp_path / "out", is_trainable=True)

    assert module.geometry is not None
    small, full = module.geometry.effective_parameters, module.geometry.trainable_parameters
    assert full == 8 * small
    assert (adapter.parameters, adapter.parameters_before) == (small, full)
    assert loaded.get_nb_trainable_parameters()[0] == small
    loaded.print_trainable_parameters()
    assert f"trainable params: {small:,} " in capsys.readouterr().out
    header = 5_000  # bytes: names and shapes, the same for both
    sizes = {name: (tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("full", "out")}
    assert sizes["out"] < 4 * small + header < sizes["full"]


def test_uniform_rank_needs_no_patterns(make_module: Make, tmp_path: Path) -> None:
    export_adapter(make_module(rank_of=lambda index, name, r: 3), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 6, {}, {})
    assert config["inference_mode"] is True


def test_names_that_end_alike_keep_their_own_ranks() -> None:
    """PEFT matches pattern keys as regular expressions, and the end of a name too: each layer must match only itself."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_q, self.a = nn.Linear(4, 4), nn.ModuleDict({"q": nn.Linear(4, 4)})

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.a_q, self.a = Inner(), nn.Linear(4, 4), nn.ModuleDict({"q": nn.Linear(4, 4)})

    names = ["a.q", "a_q", "inner.a.q", "inner.a_q"]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["a_q", "q"])
    trained = {}
    for rank, name in enumerate(names, start=1):
        b = torch.ones(4, 4)
        b[:, rank:] = 0
        trained[f"base_model.model.{name}.lora_A.default.weight"] = torch.ones(4, 4)
        trained[f"base_model.model.{name}.lora_B.default.weight"] = b
    compacted = compact(config, trained)
    rebuilt = _lora_layers(PeftModel(Outer(), compacted.config))
    assert {name: layer.r["default"] for name, layer in rebuilt.items()} == dict(zip(names, (1, 2, 3, 4), strict=True))
    assert {layer.scaling["default"] for layer in rebuilt.values()} == {1.0}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_alpha_gives_back_the_scaling(use_rslora: bool) -> None:
    for r in range(1, 40):
        for alpha in (1, 8, 16, 0.3):
            scaling = alpha / (math.sqrt(r) if use_rslora else r)
            for k in range(1, r + 1):
                found = alpha_for(scaling, k, use_rslora) / (math.sqrt(k) if use_rslora else k)
                assert found == pytest.approx(scaling, rel=4e-16), "one unit in the last place of a double"
                assert torch.tensor(found) == torch.tensor(scaling), "the same float32"


def test_whole_trained_modules_travel_with_the_adapter(
    make_module: Make, tiny_llama: LlamaForCausalLM, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    module = make_module(modules_to_save=["lm_head"])
    module.peft_model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    expected = _logits(module.peft_model, batch)
    export_adapter(module, tmp_path / "adapter")
    export_adapter(module, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(tiny_llama, tmp_path / "adapter")
    torch.testing.assert_close(_logits(loaded, batch), expected, atol=ATOL, rtol=0)
    torch.testing.assert_close(_logits(merged, batch), expected, atol=ATOL, rtol=0)


# Layers that learnt nothing.


def _some_empty(index: int, name: str, r: int) -> int:
    return 0 if "layers.0" in name else 1 + index % r


@pytest.mark.parametrize("exclude", [None, ["1.self_attn.v_proj"], r".*\.1\.self_attn\.v_proj"])
def test_layers_without_rank_are_left_out(
    exclude: Any, make_module: Make, tiny_llama: LlamaForCausalLM, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    module = make_module(rank_of=_some_empty, exclude_modules=exclude)
    adapter = export_adapter(module, tmp_path / "out")
    assert not [name for name in load_file(tmp_path / "out" / "adapter_model.safetensors") if "layers.0" in name]
    assert adapter.ranks["model.layers.0.self_attn.q_proj"] == 0
    loaded = PeftModel.from_pretrained(tiny_llama, tmp_path / "out")
    assert sorted(_lora_layers(loaded)) == [name for name, rank in sorted(adapter.ranks.items()) if rank]
    torch.testing.assert_close(_logits(loaded, batch), _logits(module.peft_model, batch), atol=ATOL, rtol=0)


def test_keep_empty_floors_them_to_one(
    make_module: Make, tiny_llama: LlamaForCausalLM, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    module = make_module(rank_of=_some_empty)
    adapter = export_adapter(module, tmp_path / "out", keep_empty=True)
    assert min(adapter.ranks.values()) == 1
    loaded = PeftModel.from_pretrained(tiny_llama, tmp_path / "out")
    assert len(_lora_layers(loaded)) == 4
    torch.testing.assert_close(_logits(loaded, batch), _logits(module.peft_model, batch), atol=ATOL, rtol=0)


# Merged models.


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("from_checkpoint", [True, False], ids=["checkpoint", "module"])
def test_merged_model_needs_transformers_only(
    quantization: str | None, from_checkpoint: bool, make_module: Make, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    if quantization:
        pytest.importorskip("bitsandbytes")
    module = make_module(rank_of=_some_empty, quantization=quantization, target_modules=ALL_LINEAR)
    before = _logits(module.peft_model, batch)
    export_adapter(_save(module, tmp_path / "c.ckpt") if from_checkpoint else module, tmp_path / "out", merge=True)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not _lora_layers(merged)
    assert getattr(merged.config, "quantization_config", None) is None
    assert merged.config.use_cache
    torch.testing.assert_close(_logits(merged, batch), before, atol=ATOL, rtol=0)
    torch.testing.assert_close(_logits(module.peft_model, batch), before, atol=0, rtol=0)  # left as it was
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([40, 41])


def test_gguf_backbone_is_saved_without_its_packing(
    make_module: Make, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    module = make_module()
    module.peft_model.get_base_model().config.quantization_config = {
        "quant_method": "gguf"
    }  # as some releases leave it
    export_adapter(module, tmp_path / "out", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(_logits(merged, batch), _logits(module.peft_model, batch), atol=ATOL, rtol=0)


def test_merged_model_in_memory_has_no_tokenizer_and_says_so(
    tiny_llama: LlamaForCausalLM, lora_config: Callable[..., LoraConfig], batch: dict[str, Tensor], tmp_path: Path
) -> None:
    module = GritLitModule(tiny_llama, lora_config(), geometry=None)
    module.configure_model()
    _give_ranks(module, _uneven)
    with pytest.warns(UserWarning, match="without a tokenizer"):
        export_adapter(module, tmp_path / "out", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(_logits(merged, batch), _logits(module.peft_model, batch), atol=ATOL, rtol=0)
    with pytest.raises(ValueError, match="names no backbone"):
        export_adapter(_save(module, tmp_path / "c.ckpt"), tmp_path / "other", merge=True)
    assert not (tmp_path / "other").exists()


# The command, and what it writes about the run.


def test_command_exports_a_real_run(
    tiny_backbone_dir: Path,
    random_batch: Callable[..., dict[str, Tensor]],
    lora_config: Callable[..., LoraConfig],
    batch: dict[str, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Trains, reduces ranks with the callbacks, stops, exports from the checkpoint alone."""
    from grit_lightning.callbacks import RankAdaptation, Reprojection

    run = tmp_path / "run"
    geometry = GeometryConfig(kfac_update_freq=2, kfac_min_samples=1)
    module = GritLitModule(str(tiny_backbone_dir), lora_config(), geometry, lr_scheduler=None, dtype="float32")
    quiet: dict[str, Any] = {
        "limit_val_batches": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        enable_checkpointing=False,
        callbacks=[Reprojection("balanced", 2, k=3), RankAdaptation(threshold=0.6, min_rank=1, every_n_steps=2)],
        **quiet,
    )
    one = {name: value[0] for name, value in random_batch().items()}
    loader = torch.utils.data.DataLoader([one] * 24, batch_size=4)
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(run / "checkpoints" / "last.ckpt")
    data = {"class_path": "x.BoolQDataModule", "init_args": {"source": "google/boolq"}}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    summary = {"global_step": 9, "metrics": {"before": {"val/accuracy": 0.5}, "after": {"val/accuracy": 0.75}}}
    (run / "summary.json").write_text(json.dumps(summary))
    assert module.geometry is not None
    assert max(module.geometry.ranks.values()) < 4

    main(["export", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--output", str(tmp_path / "new" / "out")])

    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "whoever may read the card may read the weights"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_backbone_dir), out)
    torch.testing.assert_close(_logits(loaded, batch), _logits(module.peft_model, batch), atol=ATOL, rtol=0)
    small, full = module.geometry.effective_parameters, module.geometry.trainable_parameters
    assert f"{full:,} → {small:,} parameters" in capsys.readouterr().out
    readme = (out / "README.md").read_text()
    for text in (
        "`BoolQDataModule` from `google/boolq`",
        "| val/accuracy | 0.5000 | 0.7500 |",
        f"{full:,} while training",
    ):
        assert text in readme
    assert "Measured after 9 optimizer steps" in readme
    assert f"| `model.layers.0.self_attn.q_proj` | 4 | {next(iter(module.geometry.ranks.values()))} |" in readme
    front = yaml.safe_load(readme.split("---")[1])
    assert front["library_name"] == "peft"
    assert "base_model" not in front, "a local folder is nothing that the hub could link to"

    main(["export", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"--output={tmp_path / 'merged'}", "--merge"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(_logits(merged, batch), _logits(module.peft_model, batch), atol=ATOL, rtol=0)


# Mistakes, and what is none.


def _without_training(content: dict[str, Any]) -> None:
    for name, value in content["state_dict"].items():
        if "lora_B" in name:
            value.zero_()


def _beyond_its_rank(content: dict[str, Any]) -> None:
    content["grit"]["ranks"]["base_model.model.model.layers.1.self_attn.q_proj"] = 1


BAD_CONTENT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "step 0": (lambda c: c.update(global_step=0), "was never trained: it was written at optimizer step 0"),
    "B zero": (_without_training, "was never trained: every B is zero"),
    "not grit": (lambda c: c.pop("grit"), "is no checkpoint of GritLitModule"),
    "other version": (lambda c: c["grit"].update(format_version=99), "format version 99, expected"),
    "contradiction": (_beyond_its_rank, "has effective rank 1, but B is not zero in column"),
    "diverged": (lambda c: next(iter(c["state_dict"].values())).fill_(math.nan), "hold NaN or infinity"),
    "half a layer": (lambda c: c["state_dict"].popitem(), "Expected A and B of every layer"),
}


def _refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Runs the command, and gives its one line of complaint after making sure that it has left nothing."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        main(["export", *words])
    assert stopped.value.code == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    message = capsys.readouterr().err
    assert message.startswith("grit: error: ")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(("change", "complaint"), BAD_CONTENT.values(), ids=BAD_CONTENT.keys())
@pytest.mark.parametrize("merge", [[], ["--merge"]], ids=["adapter", "merge"])
def test_bad_checkpoints(
    change: Callable[[dict[str, Any]], Any],
    complaint: str,
    merge: list[str],
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _edit(checkpoint, change)
    assert complaint in _refused(
        tmp_path, capsys, f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'new' / 'out'}", *merge
    )


def test_damaged_files(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"--output={tmp_path / 'out'}"
    whole = checkpoint.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        checkpoint.write_bytes(whole[:length])
        assert "cannot be read" in _refused(tmp_path, capsys, f"--ckpt_path={checkpoint}", output)
    torch.save(torch.ones(3), checkpoint)
    assert "holds a Tensor" in _refused(tmp_path, capsys, f"--ckpt_path={checkpoint}", output)
    assert "does not exist" in _refused(tmp_path, capsys, f"--ckpt_path={tmp_path / 'no.ckpt'}", output)
    assert "is a folder" in _refused(tmp_path, capsys, f"--ckpt_path={tmp_path}", output)


def test_output_that_is_taken(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    export_adapter(checkpoint, taken)  # empty, so it may be filled
    assert "is not empty" in _refused(tmp_path, capsys, f"--ckpt_path={checkpoint}", f"--output={taken}")
    assert "is a file" in _refused(tmp_path, capsys, f"--ckpt_path={checkpoint}", f"--output={checkpoint}")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which not even root may write")
def test_output_that_cannot_be_written(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Cannot write into /proc" in _refused(tmp_path, capsys, f"--ckpt_path={checkpoint}", "--output=/proc/a/b")


def test_failure_while_writing_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("grit_lightning.export.adapter.card", fail)  # the last thing that is written
    with pytest.raises(OSError, match="disk full"):
        export_adapter(checkpoint, tmp_path / "new" / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_backbone_matters_only_for_merging(
    checkpoint: Path, tiny_llama: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _edit(checkpoint, lambda content: content["hyper_parameters"].update(backbone="/no/such/backbone"))
    words = (f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'out'}")
    assert "/no/such/backbone" in _refused(tmp_path, capsys, *words, "--merge")
    main(["export", *words])
    assert _lora_layers(PeftModel.from_pretrained(tiny_llama, tmp_path / "out"))


@pytest.mark.parametrize(("revision", "load"), [(None, "'some/model'"), ("abc", "'some/model', revision='abc'")])
def test_hub_backbone_is_named_for_the_hub(revision: str | None, load: str, checkpoint: Path, tmp_path: Path) -> None:
    settings = {"backbone": "some/model", "revision": revision, "quantization": "nf4"}
    _edit(checkpoint, lambda content: content["hyper_parameters"].update(settings))
    export_adapter(checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/model", revision)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(readme.split("---")[1])["base_model"] == "some/model"
    assert f"AutoModelForCausalLM.from_pretrained({load})" in readme
    assert "on `some/model` (nf4) for 7 optimizer steps" in readme


@pytest.mark.parametrize(
    ("adapter", "complaint"),
    [
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "Adapters with use_dora cannot be compacted"),
        (LoraConfig(target_modules=["q_proj", "embed_tokens"]), "embedding adapters"),
        (LoraConfig(target_modules=["q_proj"], bias="all"), "biases"),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights='pissa' moves a part"),
        (AdaLoraConfig(target_modules=["q_proj"], total_step=10), "this one is AdaLoraConfig"),
    ],
    ids=["dora", "embedding", "bias", "pissa", "adalora"],
)
def test_unsupported_adapters(
    adapter: LoraConfig, complaint: str, make_tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    module = GritLitModule(make_tiny_llama(attention_bias=True), adapter, geometry=None)
    module.configure_model()
    for parameter in module.peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    for source in (module, _save(module, tmp_path / "c.ckpt")):
        with pytest.raises(ValueError, match=complaint):
            export_adapter(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["c.ckpt"]


def test_module_that_is_not_built(lora_config: Callable[..., LoraConfig], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not built yet"):
        export_adapter(GritLitModule("x/y", lora_config()), tmp_path / "out")
