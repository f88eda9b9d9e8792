r"""Does a run that is killed and resumed end like one that never stopped? Real processes, real SIGKILL, every bit compared.

    python benchmarks/kill_and_resume.py --times 20 --seed 0
    python benchmarks/kill_and_resume.py --times 20 --signal SIGTERM --every_n_steps 1000 \
        --json benchmarks/kill_and_resume_sigterm.json

Trains a tiny random Llama through the command line: dropout, accumulation, reprojection, rank changes, validation, three
epochs; AdamW and EigenbasisAdam in turn. Each run is killed at a random moment after a random step, every second one while
a checkpoint is being written, and resumed from last.ckpt to its end. Compared with an untouched run are the adapter, the
optimizer, the geometry, everything else in the last checkpoint, and every line of the logs but its time stamp. The exit
code is 1 if a single bit differs.

With `--signal SIGTERM` or SIGINT a run is asked to stop at a random moment, and none of its steps may be lost: it goes on from
the checkpoint that the signal has it write.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from grit_lightning.checkpoints.reading import read_checkpoint

CONTEXT = multiprocessing.get_context("forkserver")  # imports once, and every run is a new process from there
OPTIMIZERS = ("torch.optim.AdamW", "EigenbasisAdam")
LOGS = ("metrics.jsonl", "ranks.jsonl", "reprojections.jsonl")
ROWS = 38  # 19 micro-batches of 2 an epoch: 9 windows of 2 and one of 1
STEPS_PER_EPOCH = 10
PARTS = {"adapter": "state_dict", "optimizer": "optimizer_states", "geometry": "grit"}


class Kill(NamedTuple):
    """How one run ended, and what became of it."""

    optimizer: str
    step: int
    """Steps that were logged when the process died."""
    resumed_from: int
    where: str
    bits: dict[str, int]
    """Differing bits by part of the checkpoint."""
    lines: int
    """Differing or missing lines of the logs."""

    @property
    def difference(self) -> int:
        """All that differs, in bits and lines."""
        return sum(self.bits.values()) + self.lines


# One run.


def prepare(folder: Path, steps: int, every_n_steps: int, workers: int) -> dict[str, Path]:
    """Write backbone, tokenizer, data and one configuration an optimizer; return the configurations."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = ("<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "backbone")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(folder / "backbone")

    for split, count in (("train", ROWS), ("validation", 6)):
        rows = [
            {"question": f"is {n} even", "passage": f"{n} " * (1 + n % 7), "answer": n % 2 == 0} for n in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return {optimizer: configuration(folder, optimizer, steps, every_n_steps, workers) for optimizer in OPTIMIZERS}


def configuration(folder: Path, optimizer: str, steps: int, every_n_steps: int, workers: int) -> Path:
    """Write the YAML file of one optimizer."""
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    ranks = {"every_n_steps": 6, "threshold": 0.9, "min_rank": 2, "energy_ema": 0.5, "mixing_probability": 0.2}
    callbacks = {
        "Reprojection": {"mode": "balanced", "every_n_steps": 4},
        "RankAdaptation": ranks,
        "SpectraLogger": {"every_n_steps": 3},
        "AdapterCheckpoint": {"every_n_steps": every_n_steps, "keep_last": 2},
    }
    model = {
        "backbone": str(folder / "backbone"),
        "dtype": "float32",
        "adapter": {"class_path": "peft.LoraConfig", "init_args": {**lora, "task_type": "CAUSAL_LM"}},
        "geometry": {"kfac_update_freq": 2, "kfac_min_samples": 16, "cov_averaging": "ema"},
        "optimizer": {"class_path": optimizer, "init_args": {"lr": 0.01}},
    }
    trainer = {
        "accelerator": "cpu",
        "max_epochs": -(-steps // STEPS_PER_EPOCH),
        "max_steps": steps,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": name, "init_args": settings} for name, settings in callbacks.items()],
    }
    data = {"source": str(folder), "batch_size": 2, "max_length": 128, "num_workers": workers}
    settings = {
        "model": {"class_path": "GritLitModule", "init_args": model},
        "data": {"class_path": "BoolQDataModule", "init_args": data},
        "trainer": trainer,
    }
    path = folder / f"{optimizer.rpartition('.')[2]}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def train(words: list[str], log: Path) -> None:
    """Run `grit fit` in this child process, with its output in a file."""
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    from grit_lightning.cli.program import main

    main(words)


def run(
    config: Path,
    output: Path,
    resume: bool = False,
    stop: Callable[[Any], bool] | None = None,
    signum: signal.Signals = signal.SIGKILL,
) -> bool:
    """Train in a process of its own, sent a signal as soon as `stop` returns True; return whether that ended it."""
    words = ["fit", f"--config={config}", f"--output={output}"]
    if resume:
        words.append(f"--ckpt_path={output / 'checkpoints' / 'last.ckpt'}")
    log = output.with_suffix(".log")
    process = CONTEXT.Process(target=train, args=(words, log))
    process.start()
    while process.is_alive() and stop is not None:
        if stop(process):
            os.kill(process.pid, signum)
            process.join()
            break
        time.sleep(0.0005)
    process.join()
    if process.exitcode in (-signum, 128 + signum):
        return True
    if process.exitcode != 0:
        raise RuntimeError(f"The run ended with exit code {process.exitcode}:\n{log.read_text()[-3000:]}")
    return False


def kill_and_resume(
    config: Path,
    output: Path,
    whole: Path,
    optimizer: str,
    steps: int,
    chance: random.Random,
    writing: bool,
    signum: signal.Signals = signal.SIGKILL,
) -> Kill:
    """Kill one run, resume it, and compare it with the run that was never killed."""
    pause = chance.uniform(0.0, seconds_per_step(whole))
    checkpoints = output / "checkpoints"
    while True:
        after = chance.randrange(1, steps)

        def due(process: Any, after: int = after) -> bool:
            no_checkpoint = signum == signal.SIGKILL and not (checkpoints / "last.ckpt").exists()
            if steps_logged(output) < after or no_checkpoint:
                return False
            if writing:
                return any(name.startswith(".epoch") for name in os.listdir(checkpoints))
            time.sleep(pause)
            return bool(process.is_alive())

        if run(config, output, stop=due, signum=signum):
            break
        remove(output)  # it was faster than the kill
    step = steps_logged(output)
    unfinished = any(path.name.endswith(".unfinished") for path in checkpoints.iterdir())
    resumed_from = read_checkpoint(checkpoints / "last.ckpt")["global_step"]
    if signum != signal.SIGKILL and resumed_from < step:
        raise RuntimeError(
            f"Expected a checkpoint of step {step} or later from {signum.name}, got one of {resumed_from}."
        )
    run(config, output, resume=True)
    where = "in a checkpoint" if unfinished else "in a step"
    return Kill(optimizer.rpartition(".")[2], step, resumed_from, where, *compare(whole, output))


def remove(output: Path) -> None:
    """Remove a run with all its files."""
    shutil.rmtree(output)


def steps_logged(output: Path) -> int:
    """Return the number of steps in metrics.jsonl."""
    log = output / "metrics.jsonl"
    return log.read_text().count('"train/loss"') if log.exists() else 0


def seconds_per_step(output: Path) -> float:
    """Return the mean time of a step of a finished run, including everything between steps."""
    times = [json.loads(line)["time"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    return float(times[-1] - times[0]) / max(steps_logged(output) - 1, 1)


# Comparing.


def compare(whole: Path, other: Path) -> tuple[dict[str, int], int]:
    """Return differing bits by part of the last checkpoint, and the number of differing lines of the logs."""
    one, two = (comparable(read_checkpoint(folder / "checkpoints" / "last.ckpt")) for folder in (whole, other))
    bits = {part: differing_bits(one.pop(key), two.pop(key)) for part, key in PARTS.items()}
    bits["the rest"] = differing_bits(one, two)
    return bits, sum(differing_lines(whole / name, other / name) for name in LOGS)


def comparable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Remove from a checkpoint what is not part of the training: seconds, file sizes, names of files not yet removed."""
    del checkpoint["callbacks"]["RunRecord"], checkpoint["callbacks"]["AdapterCheckpoint"]["kept"]
    del checkpoint["grit_log"]["marks"]
    return checkpoint


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all values in nested mappings and sequences, with their paths."""
    items = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else None
    )
    if items is None:
        yield name, value
    else:
        for key, item in items:
            yield from leaves(item, f"{name}/{key}")


def differing_bits(one: Any, other: Any) -> int:
    """Count the bits in which tensors differ; a missing value, another shape, or another plain value counts as 64."""
    first, second = dict(leaves(one)), dict(leaves(other))
    total = 64 * len(first.keys() ^ second.keys())
    for name in first.keys() & second.keys():
        here, there = first[name], second[name]
        if isinstance(here, torch.Tensor) and isinstance(there, torch.Tensor) and here.shape == there.shape:
            pair = zip(as_bytes(here), as_bytes(there), strict=True)
            total += sum((a ^ b).bit_count() for a, b in pair)
        elif isinstance(here, torch.Tensor) or isinstance(there, torch.Tensor) or repr(here) != repr(there):
            total += 64
    return total


def as_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bits of a tensor, whatever its layout."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def differing_lines(one: Path, other: Path) -> int:
    """Count the lines that differ in more than their time, including missing ones."""
    parsed = []
    for path in (one, other):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        parsed.append([{key: value for key, value in line.items() if key != "time"} for line in lines])
    unequal = sum(a != b for a, b in zip(*parsed, strict=False))
    return unequal + abs(len(parsed[0]) - len(parsed[1]))


# All of it.


def main() -> int:
    """Parse the command line, kill, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="Number of kills.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument("--steps", type=int, default=24, help="Optimizer steps of a run.")
    parser.add_argument("--every_n_steps", type=int, default=2, help="Optimizer steps between two checkpoints.")
    parser.add_argument("--workers", type=int, default=0, help="Data-loader processes.")
    parser.add_argument(
        "--signal", choices=("SIGKILL", "SIGTERM", "SIGINT"), default="SIGKILL", help="What ends a run."
    )
    parser.add_argument("--json", type=Path, help="File for the raw numbers.")
    parser.add_argument("--keep", type=Path, help="Folder to leave the runs in.")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    CONTEXT.set_forkserver_preload(["grit_lightning.cli.run"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        all_kills = list(kills(folder, args))
    if args.json is not None:
        raw = [kill._asdict() for kill in all_kills]
        settings = {"signal": args.signal, "times": args.times, "seed": args.seed, "steps": args.steps}
        args.json.write_text(json.dumps(settings | {"kills": raw}, indent=1) + "\n", encoding="utf-8")
    return report(all_kills)


def kills(folder: Path, args: argparse.Namespace) -> Iterator[Kill]:
    """Kill and resume the requested number of runs, and print one line for each."""
    chance = random.Random(args.seed)
    configs = prepare(folder, args.steps, args.every_n_steps, args.workers)
    wholes = {optimizer: folder / f"whole-{path.stem}" for optimizer, path in configs.items()}
    for number in range(args.times):
        optimizer = OPTIMIZERS[number % len(OPTIMIZERS)]
        if not wholes[optimizer].exists():
            run(configs[optimizer], wholes[optimizer])
        signum = signal.Signals[args.signal]
        writing = signum == signal.SIGKILL and number // len(OPTIMIZERS) % 2 == 1
        output, whole = folder / f"killed-{number}", wholes[optimizer]
        kill = kill_and_resume(configs[optimizer], output, whole, optimizer, args.steps, chance, writing, signum)
        print(
            f"kill {number + 1:2d}  {kill.optimizer:14s}  after step {kill.step:2d}, {kill.where:15s}  resumed from "
            f"{kill.resumed_from:2d}  differing bits {sum(kill.bits.values())}, lines {kill.lines}",
            flush=True,
        )
        yield kill


def report(all_kills: list[Kill]) -> int:
    """Print the closing table; return the exit code."""
    print("\n| killed | times | steps | bits: " + " | ".join([*PARTS, "the rest"]) + " | lines of the logs |")
    print("|---" * (5 + len(PARTS)) + "|")
    for where in sorted({kill.where for kill in all_kills}):
        chosen = [kill for kill in all_kills if kill.where == where]
        bits = [str(sum(kill.bits[part] for kill in chosen)) for part in (*PARTS, "the rest")]
        steps = ", ".join(str(step) for step in sorted(kill.step for kill in chosen))
        print(f"| {where} | {len(chosen)} | {steps} | {' | '.join(bits)} | {sum(kill.lines for kill in chosen)} |")
    different = sum(kill.difference for kill in all_kills)
    print(f"\n{len(all_kills)} kills: " + ("nothing differs" if different == 0 else "DIFFERENT"))
    return 0 if different == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
