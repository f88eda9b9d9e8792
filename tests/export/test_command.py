"""`grit export` on a run that was really trained: adapter, merged model, and a README.md that tells about the run.

The tolerance is that of test_adapter.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.cli.program import main

ATOL = 1e-5

Logits = Callable[..., Tensor]


def test_command_exports_a_real_run(
    tiny_backbone_dir: Path,
    random_batch: Callable[..., dict[str, Tensor]],
    lora_config: Callable[..., LoraConfig],
    batch: dict[str, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    logits: Logits,
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
        callbacks=[Reprojection("balanced", 2), RankAdaptation(threshold=0.6, min_rank=1, max_rank=3, every_n_steps=2)],
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
    torch.testing.assert_close(logits(loaded, batch), logits(module.peft_model, batch), atol=ATOL, rtol=0)
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
    torch.testing.assert_close(logits(merged, batch), logits(module.peft_model, batch), atol=ATOL, rtol=0)
