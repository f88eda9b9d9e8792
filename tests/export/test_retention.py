"""`retain_adapter`: a plain PEFT adapter in, a plain PEFT adapter out, that forgets less at a price that is measured."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from grit_lightning.export import RetentionResult, retain_adapter

Rows = Callable[[int, int], Any]
Retain = Callable[..., RetentionResult]


@pytest.fixture
def retain(task_rows: Rows, general_rows: Rows) -> Retain:
    """`retain_adapter` with rows; keywords override."""

    def run(adapter: Any, **overrides: Any) -> RetentionResult:
        rows: dict[str, Any] = {
            "task_rows": task_rows(24, 2),
            "general_rows": {"general": general_rows(24, 1)},
            "held_out_task": task_rows(12, 7),
            "held_out_general": {"general": general_rows(12, 8)},
        }
        target = {} if overrides.keys() & {"mu", "forgetting", "task_tolerance"} else {"mu": 0.1}
        return retain_adapter(adapter, **(rows | target | overrides))

    return run


def logits(folder: Path, backbone: Path) -> torch.Tensor:
    """What plain PEFT computes."""
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(backbone), str(folder)).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(10, 40)[None]).logits


def test_the_written_folder_is_the_edited_model_in_plain_peft(
    retain: Retain, adapter_dir: Path, knowing_backbone: Path, tmp_path: Path
) -> None:
    before = {file.name: file.read_bytes() for file in adapter_dir.iterdir()}
    result = retain(adapter_dir)
    out = result.save(tmp_path / "out")
    assert {file.name: file.read_bytes() for file in adapter_dir.iterdir()} == before, "the source is never changed"
    tensors, original = (
        load_file(out / "adapter_model.safetensors"),
        load_file(adapter_dir / "adapter_model.safetensors"),
    )
    assert tensors.keys() == original.keys()
    for layer, x in result.maps.items():
        torch.testing.assert_close(tensors[f"{layer}.lora_B.weight"], original[f"{layer}.lora_B.weight"] @ x)
    assert all(torch.equal(tensors[name], original[name]) for name in tensors if "lora_A" in name)
    changed = logits(out, knowing_backbone)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(knowing_backbone), str(adapter_dir)).eval()
    with torch.no_grad():
        for layer, x in result.maps.items():
            weight = model.get_submodule(layer).lora_B["default"].weight
            weight.copy_(weight @ x)
        torch.testing.assert_close(model(input_ids=torch.arange(10, 40)[None]).logits, changed, atol=1e-5, rtol=1e-5)


def test_the_folder_says_what_was_done(retain: Retain, adapter_dir: Path, tmp_path: Path) -> None:
    result = retain(adapter_dir, task_tolerance=0.05, compare=("scaling", "diagonal"), evaluations=4)
    out = result.save(tmp_path / "deep" / "out")
    front = json.loads((out / "front.json").read_text())
    assert front["target"] == {"kind": "task_tolerance", "value": 0.05}
    assert front["mu"] == result.mu == front["chosen"]["mu"]
    assert front["peers"].keys() == {"scaling", "diagonal"}
    assert [point["method"] for point in front["front"][:2]] == ["unedited", "backbone"]
    assert front["calibration"]["general"]["rows"] == 24
    assert front["held_out"]["task"]["rows"] == 12
    card = (out / "README.md").read_text()
    assert str(adapter_dir) in card
    assert f"μ = {result.mu:.3g}" in card
    assert f"{result.chosen.general.change:+.4f}" in card
    assert "PeftModel.from_pretrained" in card
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")


def test_less_is_forgotten_and_the_task_keeps_its_bound(retain: Retain, adapter_dir: Path) -> None:
    result = retain(adapter_dir, task_tolerance=0.05)
    unedited, scaled = result.front[0], result.peers["scaling"]
    assert result.chosen.task.change <= 0.05
    assert result.chosen.general.change < unedited.general.change
    assert scaled is not None
    assert result.chosen.general.change < scaled.general.change


def test_a_model_in_memory_is_left_as_it_is(retain: Retain, adapted: PeftModel, adapter_dir: Path) -> None:
    before = copy.deepcopy(adapted.state_dict())
    result = retain(adapted)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    from_folder = retain(adapter_dir)
    assert result.adapter.tensors.keys() == from_folder.adapter.tensors.keys()
    for name, value in result.adapter.tensors.items():
        torch.testing.assert_close(value, from_folder.adapter.tensors[name])


def test_half_precision_files_stay_half(retain: Retain, adapted: PeftModel, adapter_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "half"
    folder.mkdir()
    for file in adapter_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    halves = {name: value.bfloat16() for name, value in load_file(adapter_dir / "adapter_model.safetensors").items()}
    save_file(halves, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert {value.dtype for value in retain(folder).adapter.tensors.values()} == {torch.bfloat16}


def test_an_existing_folder_is_not_overwritten(retain: Retain, adapter_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    result = retain(adapter_dir)
    with pytest.raises(FileExistsError, match="--output"):
        result.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"general_rows": {}}, "general_rows: expected at least one source"),
        ({"held_out_general": {}}, "held_out_general: expected at least one source"),
        (
            {"general_rows": {"tiny": [{"input_ids": [10, 11, 12], "learnt": [1, 3]}]}},
            "at least 40 tokens, got 3",
        ),
        ({"general_rows": {"none": []}}, "none: expected rows, got none"),
        (
            {"held_out_task": [{"input_ids": [999, 10], "learnt": [1, 2]}]},
            "task: expected token ids below 320.*got 999",
        ),
        ({"held_out_task": [{"input_ids": [9] * 200, "learnt": [1, 200]}]}, "at most 128 tokens.*got 200"),
        ({"held_out_general": {"task": [{"input_ids": [9, 9], "learnt": [1, 2]}]}}, "names other than 'task'"),
        ({"general_weights": {"general": 0.0}}, "general_weights of general.*> 0"),
        ({"method": "magic"}, "method: expected one of retention"),
        ({"compare": ("magic",)}, "method: expected one of retention"),
        ({"mu": 0.1, "forgetting": 0.0}, "exactly one"),
        ({"forgetting": 50.0}, r"forgetting: expected a bound below what the adapter has forgotten.*got 50.*as it is"),
        (
            {"forgetting": -50.0, "evaluations": 3},
            "forgetting: expected a bound that some strength keeps.*Nothing was written",
        ),
    ],
)
def test_what_cannot_be_done_is_said(retain: Retain, adapter_dir: Path, overrides: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retain(adapter_dir, **overrides)


def test_a_tolerance_that_no_strength_keeps_is_refused(retain: Retain, adapter_dir: Path) -> None:
    """Few looks, all of them too strong."""
    with pytest.raises(ValueError, match=r"task_tolerance: expected a bound.*Raise it to that. Nothing was written"):
        retain(adapter_dir, task_tolerance=0.0, evaluations=1, compare=())


def test_held_out_rows_that_were_calibrated_on_are_refused(
    retain: Retain, adapter_dir: Path, task_rows: Rows, general_rows: Rows
) -> None:
    with pytest.raises(
        ValueError, match="rows of task: expected held-out rows that are not calibration rows, got 2 of 14"
    ):
        retain(adapter_dir, held_out_task=[*task_rows(12, 7), *task_rows(24, 2)[:2]])
    with pytest.raises(ValueError, match=r"rows of general.*got 1 of 13"):
        retain(adapter_dir, held_out_general={"general": [*general_rows(12, 8), general_rows(24, 1)[0]]})


def test_what_is_no_plain_lora_is_refused(retain: Retain, knowing_backbone: Path, tmp_path: Path) -> None:
    ia3 = get_peft_model(LlamaForCausalLM.from_pretrained(knowing_backbone), IA3Config(task_type="CAUSAL_LM"))
    ia3.save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(ValueError, match="--adapter: expected a LoRA adapter, got IA3"):
        retain(tmp_path / "ia3")
    dora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(knowing_backbone), dora)
    with pytest.raises(ValueError, match=r"expected a plain linear LoRA layer, got .*Dora"):
        retain(model)


def test_another_backbone_is_refused(retain: Retain, adapter_dir: Path, tiny_llama: LlamaForCausalLM) -> None:
    config = copy.deepcopy(tiny_llama.config)
    config.intermediate_size = 48
    with pytest.raises(ValueError, match=r"--backbone: expected the model .* was trained on"):
        retain(adapter_dir, backbone=LlamaForCausalLM(config))
    config = copy.deepcopy(tiny_llama.config)
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"--backbone: .* with other layers"):
        retain(adapter_dir, backbone=LlamaForCausalLM(config))


def test_what_is_no_adapter_is_refused(retain: Retain, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--adapter: expected the folder of a PEFT adapter or a checkpoint"):
        retain(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"--adapter: .* no adapter_config.json"):
        retain(tmp_path)


def test_beside_a_strength_others_are_searched_for_as_little_forgetting(retain: Retain, adapter_dir: Path) -> None:
    result = retain(adapter_dir, mu=0.1)
    scaled = result.peers["scaling"]
    assert result.mu == 0.1
    assert scaled is not None
    assert scaled.general.change <= result.chosen.general.change
    assert scaled.task.change > result.chosen.task.change


def test_the_active_adapter_is_the_one_that_is_written(
    retain: Retain, adapted: PeftModel, adapter_dir: Path, knowing_backbone: Path, tmp_path: Path
) -> None:
    """Whatever its name, and whatever other adapters the model has."""
    other = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(knowing_backbone), str(adapter_dir), adapter_name="mine"
    )
    other.add_adapter("idle", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected = retain(adapted)
    named = retain(other)
    assert named.adapter.tensors.keys() == expected.adapter.tensors.keys()
    for name, value in named.adapter.tensors.items():
        torch.testing.assert_close(value, expected.adapter.tensors[name])
    named.save(tmp_path / "out")
    assert named.front[0].task.value == pytest.approx(expected.front[0].task.value)


def test_a_start_that_moved_the_backbone_is_refused(retain: Retain, knowing_backbone: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(knowing_backbone), config)
    with pytest.raises(ValueError, match=r"init_lora_weights 'pissa' in the model.*Convert it"):
        retain(model)
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(str(tmp_path / "moved"))
    with pytest.raises(ValueError, match=r"init_lora_weights 'pissa' in .*moved"):
        retain(tmp_path / "moved", backbone=str(knowing_backbone))


def test_the_backbone_is_measured_without_what_was_trained_beside_the_factors(
    retain: Retain, adapted: PeftModel, knowing_backbone: Path
) -> None:
    expected = retain(adapted).front[1]
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(knowing_backbone), config)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "modules_to_save" in name).mul_(0.5)
    found = retain(model).front[1]
    assert found.task.value == pytest.approx(expected.task.value)
    assert found.general.value == pytest.approx(expected.general.value)


def test_a_given_backbone_comes_back_without_the_adapter(
    retain: Retain, adapter_dir: Path, knowing_backbone: Path
) -> None:
    backbone = LlamaForCausalLM.from_pretrained(knowing_backbone)
    before = copy.deepcopy(backbone.state_dict())
    first, second = (retain(adapter_dir, backbone=backbone) for _ in range(2))
    assert backbone.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert first.front[0].general.value == second.front[0].general.value
    with pytest.raises(ValueError, match="backbone: expected a model without an adapter"):
        retain(adapter_dir, backbone=PeftModel.from_pretrained(backbone, str(adapter_dir)).get_base_model())


def test_what_is_measured_is_what_is_written(
    retain: Retain, adapter_dir: Path, knowing_backbone: Path, tmp_path: Path, task_rows: Rows
) -> None:
    """A file in float16 rounds B X: the front is that of the rounded one."""
    from safetensors.torch import save_file

    for file in adapter_dir.iterdir():
        (tmp_path / "half").mkdir(exist_ok=True)
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    halves = {n: v.bfloat16() for n, v in load_file(adapter_dir / "adapter_model.safetensors").items()}
    save_file(halves, tmp_path / "half" / "adapter_model.safetensors", metadata={"format": "pt"})
    result = retain(tmp_path / "half", mu=0.3)
    out = result.save(tmp_path / "out")
    again = retain(out, mu=0.3)
    assert again.front[0].task.value == pytest.approx(result.chosen.task.value, abs=1e-6)


def test_a_tolerance_that_the_backbone_keeps_too_is_refused(retain: Retain, adapter_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"task_tolerance: expected less than what the adapter has learnt .*got 100"):
        retain(adapter_dir, task_tolerance=100.0)


def test_a_bound_that_is_named_as_the_least_can_be_asked_for(retain: Retain, adapter_dir: Path) -> None:
    with pytest.raises(ValueError, match="Raise it to that") as refused:
        retain(adapter_dir, forgetting=-50.0, evaluations=2)
    named = float(re.search(r"measured is ([+-][\d.]+)", str(refused.value))[1])  # type: ignore[index]
    assert retain(adapter_dir, forgetting=named, evaluations=2).chosen.general.change <= named


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"general_weights": {"genral": 5.0}}, "general_weights: expected names among general, got genral"),
        ({"confidence": 2.0}, "confidence.*in .0, 1."),
        ({"evaluations": 0}, "evaluations.*≥ 1"),
        ({"batch_size": 0}, "batch_size.*≥ 1"),
        ({"damping": -1.0}, "damping.*≥ 0"),
        (
            {"task_metric": lambda model: torch.ones(3)},
            "task_metric: expected a finite number for each of the task's 12",
        ),
        ({"task_metric": lambda model: torch.full((12,), torch.nan)}, "task_metric: expected a finite number"),
        ({"general_rows": {"task": [{"input_ids": [9, 9], "learnt": [1, 2]}]}}, "names other than 'task'"),
        ({"held_out_task": [{"input_ids": [9, 9], "learnt": []}]}, "rows that each predict a token, got 1 of 1"),
        ({"held_out_task": [{"input_ids": [-4, 9], "learnt": [1, 2]}]}, "token ids below 320.*got -4"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    retain: Retain, adapter_dir: Path, overrides: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        retain(adapter_dir, **overrides)


def test_a_backbone_beside_a_model_is_refused(retain: Retain, adapted: PeftModel, knowing_backbone: Path) -> None:
    with pytest.raises(ValueError, match="backbone: expected none beside a model"):
        retain(adapted, backbone=str(knowing_backbone))
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="switched on and not merged"):
        retain(adapted)


def test_a_loss_that_is_not_finite_is_named(retain: Retain, adapted: PeftModel, general_rows: Rows) -> None:
    with torch.no_grad():
        adapted.get_input_embeddings().weight[300] = torch.nan  # of a token that only one held-out row has
    broken = {"input_ids": [300, 301, 302], "learnt": [1, 3]}
    with pytest.raises(
        FloatingPointError, match=r"unedited adapter, loss on general: expected finite numbers.* in row 12"
    ):
        retain(adapted, held_out_general={"general": [*general_rows(12, 8), broken]})


def test_the_card_of_a_model_without_a_name_can_be_read(retain: Retain, adapted: PeftModel, tmp_path: Path) -> None:
    adapted.active_peft_config.base_model_name_or_path = None
    card = (retain(adapted).save(tmp_path / "out") / "README.md").read_text()
    assert "a model in memory, trained on a model without a name" in card
    assert "from_pretrained('path/to/its/backbone')" in card
