"""Does a run on two processes give what a run on one gives? Compares weights, statistics and metrics; counts collectives.

    python benchmarks/processes.py              differences and collectives, about two minutes
    python benchmarks/processes.py --memory     resident memory of every process, DDP against FSDP

Trains a tiny random Llama for ten optimizer steps with accumulation, rows of uneven length, a micro-batch without a label,
an epoch that ends inside a window, reprojection and rank changes: on one process, and with the same global batches on two
processes (gloo) under DDP, FSDP and FSDP2. The exit code is 1 if replicas differ in a bit, or ranks between strategies.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {"one": "auto", "ddp": "ddp", "fsdp": "grit_fsdp", "fsdp2": "grit_fsdp2"}
MICRO_BATCHES = 38  # nine windows of four and one of two on one process; of two and one on two processes
WINDOW = 4
UPDATE_FREQ = 3


# What is trained.


def write_backbone(folder: Path, **sizes: Any) -> Path:
    """Save a seeded random Llama; return its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {"vocab_size": 320, "max_position_embeddings": 128, "pad_token_id": 0} | small | sizes
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


def micro_batches(count: int, seed: int = 0, vocabulary: int = 320) -> list[dict[str, Tensor]]:
    """Return rows of uneven length and uneven numbers of labels; the second micro-batch has no label at all."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number in range(count):
        ids = torch.randint(4, vocabulary, (2, 16), generator=generator)
        length = torch.randint(6, 17, (2, 1), generator=generator)
        real, learnt = torch.arange(16) < length, torch.arange(16) >= number % 5
        labels = ids.masked_fill(~(real & learnt), -100)
        if number == 1:
            labels[:] = -100
        batches.append({"input_ids": ids.masked_fill(~real, 0), "attention_mask": real.long(), "labels": labels})
    return batches


def make_module(backbone: Any, geometry: Mapping[str, Any] | None, **settings: Any) -> Any:
    """Return a module with a rank-8 LoRA; `geometry` None trains the plain adapter."""
    from peft import LoraConfig

    from grit_lightning import GeometryConfig, GritLitModule

    lora = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = None if geometry is None else GeometryConfig(**geometry)
    defaults: dict[str, Any] = {"optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3), "lr_scheduler": None}
    return GritLitModule(str(backbone), LoraConfig(**lora), config, **(defaults | {"dtype": "float32"} | settings))


def make_trainer(kind: str, **settings: Any) -> Any:
    """Return a quiet CPU Trainer; the window is the same number of micro-batches over all processes."""
    import lightning.pytorch as pl

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": processes,
        "strategy": KINDS[kind],
        "max_epochs": 1,
        "accumulate_grad_batches": WINDOW // processes,
        "gradient_clip_val": 0.5,
        "logger": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(defaults | settings))


def share(batches: list[dict[str, Tensor]]) -> Any:
    """Return this process's part of the micro-batches, as a loader."""
    from torch.utils.data import DataLoader

    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return DataLoader(batches[rank::processes], batch_size=None)  # type: ignore[arg-type]


def train(kind: str, backbone: Path) -> dict[str, Any]:
    """Train the run that is compared; return everything that is compared."""
    import lightning.pytorch as pl

    from grit_lightning.callbacks import RankAdaptation, Reprojection

    class Losses(pl.Callback):
        def __init__(self) -> None:
            self.values: list[float] = []
            self._step = 0

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step != self._step:
                self._step = trainer.global_step
                self.values.append(float(trainer.callback_metrics["train/loss"]))

    losses = Losses()
    ranks = RankAdaptation(every_n_steps=5, threshold=0.9, min_rank=1)
    callbacks = [Reprojection("balanced", every_n_steps=4), ranks, losses]
    pl.seed_everything(7, verbose=False)
    geometry = {"kfac_update_freq": UPDATE_FREQ, "kfac_min_samples": 1}
    module, trainer = make_module(backbone, geometry), make_trainer(kind, callbacks=callbacks)
    trainer.fit(module, share(micro_batches(MICRO_BATCHES)), share(micro_batches(4, seed=1)))
    views = module.geometry.layers
    return {
        "Σ_a": {name: view.a_cov.clone() for name, view in views.items()},
        "Σ_g": {name: view.g_cov.clone() for name, view in views.items()},
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "train/loss": torch.tensor(losses.values),
        "val/loss": trainer.callback_metrics["val/loss"].clone(),
        "ranks": module.geometry.ranks,
        "tokens": {name: view.n_samples for name, view in views.items()},
        "steps": trainer.global_step,
        "reprojections": module.geometry.reprojection_count,
    }


# What it costs.


class Collectives(TorchDispatchMode):
    """Counts every collective, whoever calls it, and the bytes that this process contributes."""

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operations of torch.distributed, and run every operation unchanged."""
        if func.namespace == "c10d" and "barrier" not in func.__name__:
            name = func._opname.strip("_")
            self.calls[name] += 1
            self.bytes[name] += sum(tensor.nbytes for tensor in _tensors(args[1 if "base" in name else 0]))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def count(kind: str, backbone: Path) -> dict[str, Any]:
    """Count the collectives of two refresh periods of training, with the geometry and without."""
    with_geometry = {"kfac_update_freq": UPDATE_FREQ, "kfac_min_samples": 1}
    found: dict[str, Any] = {"steps": 2 * UPDATE_FREQ, "plain": _counted(kind, backbone, None)}
    found["geometry"] = _counted(kind, backbone, with_geometry)
    if kind == "fsdp2":
        from grit_lightning.distributed.strategies import GritFSDP2Strategy

        class ShardsAdapter(GritFSDP2Strategy):
            def _adapter(self) -> list[Any]:
                return []  # nothing is kept whole

        found["sharded adapter"] = _counted(kind, backbone, None, strategy=ShardsAdapter())
    module = make_module(backbone, with_geometry)
    module.configure_model()
    groups = module.geometry.groups
    found["floats_of_statistics"] = sum(2 * len(group.sites) * group.r**2 for group in groups)
    found["layers"] = sum(len(group.sites) for group in groups)
    return found


def _counted(kind: str, backbone: Path, geometry: Mapping[str, Any] | None, **settings: Any) -> dict[str, Any]:
    import lightning.pytorch as pl

    counter = Collectives()

    class OnlyTraining(pl.Callback):
        def on_train_start(self, *args: Any) -> None:
            counter.__enter__()

        def on_train_end(self, *args: Any) -> None:
            counter.__exit__(None, None, None)

    settings = {"callbacks": [OnlyTraining()], "limit_val_batches": 0, "log_every_n_steps": 1000} | settings
    trainer = make_trainer(kind, **settings)
    trainer.fit(make_module(backbone, geometry), share(micro_batches(2 * UPDATE_FREQ * WINDOW)))
    return {"calls": dict(counter.calls), "bytes": dict(counter.bytes)}


def memory(kind: str, backbone: Path) -> dict[str, float]:
    """Return the resident MiB of this process: after the imports, while training, and at the peak."""
    import grit_lightning.module  # noqa: F401 (what every process pays before there is a model)

    start = _resident("VmRSS")
    module, trainer = make_module(backbone, {"kfac_update_freq": 1}), make_trainer(kind, limit_val_batches=0)
    trainer.fit(module, share(micro_batches(WINDOW)))
    return {"imports": start, "training": _resident("VmRSS"), "peak": _resident("VmHWM")}


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


# Several processes.


def work(args: argparse.Namespace) -> None:
    """Run all requested jobs one after the other on this process; each result goes to a file named by rank."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    jobs = {"train": train, "count": count, "memory": memory}
    for kind in args.kinds.split(","):
        for job in args.jobs.split(","):
            torch.save(jobs[job](kind, args.backbone), args.out / f"{job}-{kind}-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(processes: int, script: Path, *words: str, timeout: int = 600) -> str:
    """Run a script, under torchrun if it is to run on several processes; return its output, raise if it fails."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["MALLOC_MMAP_THRESHOLD_"] = (
        "131072"  # freed memory goes back at once, so that resident is what is in use
    )
    done = subprocess.run(
        [*start, str(script), *words], capture_output=True, text=True, timeout=timeout, check=False, env=environment
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(words)} ended with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
        )
    return done.stdout + done.stderr


# Comparing.


def largest_difference(one: Any, other: Any) -> float:
    """Return the largest absolute difference of two tensors, or mappings of them, relative to the first one's largest entry."""
    if isinstance(one, Mapping):
        pairs = [(torch.as_tensor(one[name]).double(), torch.as_tensor(other[name]).double()) for name in one]
    else:
        pairs = [(one.double(), other.double())]
    scale = max(float(a.abs().max()) for a, _ in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / (scale or 1.0)


def replicas_agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two processes have ended with the same bits."""
    same = all(one[key] == other[key] for key in ("ranks", "tokens"))
    return same and all(
        torch.equal(one[part][name], other[part][name]) for part in ("Σ_a", "Σ_g", "weights") for name in one[part]
    )


def report_differences(folder: Path) -> bool:
    """Print the table of differences; return whether all is well."""
    runs = {kind: torch.load(folder / f"train-{kind}-0.pt", weights_only=True) for kind in KINDS}
    one = runs.pop("one")
    parts = ["Σ_a", "Σ_g", "weights", "train/loss", "val/loss"]
    print(f"\nAfter {one['steps']} steps, {one['reprojections']} reprojections, ranks {sorted(one['ranks'].values())};")
    print("relative to the largest entry on one process:\n")
    print("| two processes | " + " | ".join(parts) + " | ranks | tokens | replicas |")
    print("|---" * (len(parts) + 4) + "|")
    good = True
    for kind, run in runs.items():
        other = torch.load(folder / f"train-{kind}-1.pt", weights_only=True)
        agree, ranks, tokens = replicas_agree(run, other), run["ranks"] == one["ranks"], run["tokens"] == one["tokens"]
        good = good and agree and ranks and tokens
        cells = [f"{largest_difference(one[part], run[part]):.1e}" for part in parts]
        words = [
            "equal" if ranks else "DIFFERENT",
            "equal" if tokens else "DIFFERENT",
            "bitwise" if agree else "DIFFERENT",
        ]
        print(f"| {kind.upper()} | {' | '.join(cells + words)} |")
    return good


def report_collectives(folder: Path) -> None:
    """Print what the geometry adds to the collectives of a strategy."""
    print("\nCollectives of one process while training, with and without the geometry:\n")
    print("| strategy | steps | without: calls, bytes | GRIT adds: calls, bytes | bound: 2·layers·r² floats |")
    print("|---|---:|---|---|---:|")
    for kind in list(KINDS)[1:]:
        found = torch.load(folder / f"count-{kind}-0.pt", weights_only=True)
        plain, geometry = (
            (sum(found[n]["calls"].values()), sum(found[n]["bytes"].values())) for n in ("plain", "geometry")
        )
        steps, bound = found["steps"], 4 * found["floats_of_statistics"]
        print(
            f"| {kind.upper()} | {steps} | {plain[0]}, {plain[1]:,} | {geometry[0] - plain[0]}, {geometry[1] - plain[1]:,} | "
            f"{bound:,} bytes a reduction, every {UPDATE_FREQ} steps |"
        )
        if "sharded adapter" in found:
            sharded = found["sharded adapter"]
            calls, size = sum(sharded["calls"].values()), sum(sharded["bytes"].values())
            print(f"| {kind.upper()}, adapter sharded too | {steps} | {calls}, {size:,} | | |")


def report_memory(folder: Path, parameters: int) -> None:
    """Print resident memory by strategy and process."""
    print(f"\nResident MiB above the imports; the float32 backbone has {parameters / 2**18:.0f} MiB:\n")
    print("| strategy | process | while training | peak |")
    print("|---|---|---:|---:|")
    for kind in list(KINDS)[1:]:
        for rank in range(2):
            found = torch.load(folder / f"memory-{kind}-{rank}.pt", weights_only=True)
            row = [f"{found[name] - found['imports']:.0f}" for name in ("training", "peak")]
            print(f"| {kind.upper()} | {rank} | {' | '.join(row)} |")


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="Measure memory instead, on a larger model.")
    for name in ("kinds", "jobs"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("backbone", "out"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kinds:
        work(args)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder, script = Path(scratch), Path(__file__).resolve()
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16} if args.memory else {}
        backbone = write_backbone(folder / "backbone", **sizes)
        words = [f"--backbone={backbone}", f"--out={folder}"]
        if args.memory:
            for kind in list(KINDS)[1:]:
                launch(2, script, f"--kinds={kind}", "--jobs=memory", *words)
            config = json.loads((backbone / "config.json").read_text())
            report_memory(folder, _parameters(config))
            return 0
        launch(1, script, "--kinds=one", "--jobs=train", *words)
        launch(2, script, "--kinds=ddp,fsdp,fsdp2", "--jobs=train,count", *words)
        good = report_differences(folder)
        report_collectives(folder)
        return 0 if good else 1


def _parameters(config: Mapping[str, Any]) -> int:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**config)).parameters())


if __name__ == "__main__":
    sys.exit(main())
