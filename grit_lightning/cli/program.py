"""The `grit` program: which subcommand is run.

`fit`, `validate`, `test` and `predict` are one LightningCLI; the others need no Trainer and have parsers of their own. What can
be said without torch is said before it is imported: the help, a misspelt word, a configuration or checkpoint that is not there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import groupby

from grit_lightning import __version__
from grit_lightning.cli.data import data_command
from grit_lightning.cli.eval_harness import harness_command
from grit_lightning.cli.export import export_command
from grit_lightning.cli.plan import plan_command
from grit_lightning.cli.prepare import prepare_command
from grit_lightning.cli.retain import retain_command
from grit_lightning.cli.run_words import SUBCOMMANDS, settle
from grit_lightning.cli.terminal import (
    one_line_errors,
    silence_known_noise,
    take_verbose_errors,
    usage_error,
)
from grit_lightning.configs import shipped_configs
from grit_lightning.errors import did_you_mean
from grit_lightning.runs.signals import ended_by_signals

COMMANDS = {
    "data": data_command,
    "plan": plan_command,
    "export": export_command,
    "retain": retain_command,
    "prepare": prepare_command,
    "eval-harness": harness_command,
}
PURPOSES = SUBCOMMANDS | {
    "data": "Show what the model of a `grit fit` will see: rows, lengths, batches, and what is amiss.",
    "plan": "Say what a `grit fit` will take: memory by part, steps, checkpoint; with --measure its time.",
    "export": "Write a trained adapter for plain PEFT and transformers, or merge it into the model.",
    "retain": "Undo what a trained adapter has forgotten, at a price for its task that is measured.",
    "prepare": "Download a task's data, check them, and write them into a folder.",
    "eval-harness": "Evaluate a trained adapter with EleutherAI's lm-evaluation-harness.",
}


def main(args: list[str] | None = None) -> None:
    """Run the program.

    Args:
        args: Command-line words; those of the process when None.
    """
    words = take_verbose_errors(sys.argv[1:] if args is None else args)
    silence_known_noise()
    if (
        os.getcwd() not in sys.path
    ):  # a module beside the data is a class path; last, so that it hides no installed package
        sys.path.append(os.getcwd())
    with one_line_errors(), ended_by_signals():
        _run(words)


def _run(words: Sequence[str]) -> None:
    first = words[0] if words else "--help"
    if first in ("-h", "--help"):
        sys.stdout.write(overview())
    elif first == "--version":
        sys.stdout.write(f"grit {__version__}\n")
    elif first in COMMANDS:
        COMMANDS[first](words[1:])
    elif first in SUBCOMMANDS:
        settled = settle(first, words[1:])
        from grit_lightning.cli.run import GritCLI  # the first import of torch

        GritCLI([first, *settled])
    else:
        later = next((word for word in words if word in PURPOSES), None)
        hint = f" Write it first: `grit {later} {first} …`." if later else did_you_mean(first, PURPOSES)
        usage_error(f"expected one of {', '.join(PURPOSES)} as the first word, got {first!r}.{hint}")


def overview() -> str:
    """Return what `grit --help` says: all subcommands, and the shipped configurations by folder."""
    lines = ["usage: grit SUBCOMMAND [--config NAME ...] [options]", ""]
    lines += ["GRIT for PyTorch Lightning: LoRA fine-tuning that knows the curvature of its own low-rank space.", ""]
    lines += ["subcommands (`grit SUBCOMMAND --help` lists the options of one):"]
    lines += [f"  {name:14}{purpose}" for name, purpose in PURPOSES.items()]
    lines += [
        "",
        "shipped configurations, for --config, which takes files too, several in order, each laid over those before:",
    ]
    by_folder = sorted(shipped_configs(), key=lambda name: (name.rpartition("/")[0], name))
    for _, names in groupby(by_folder, key=lambda name: name.rpartition("/")[0]):
        lines += [f"  {', '.join(names)}"]
    lines += ["", "options:"]
    lines += ["  -h, --help        Show this message.", "  --version         Show the version."]
    lines += [
        "  --verbose-errors  Show all that is known of an error, with its traceback (or set GRIT_VERBOSE_ERRORS=1)."
    ]
    lines += [
        "",
        "examples:",
        "  grit fit --config demo",
        "  grit fit --config boolq --model.adapter.r 8 --output runs/mine",
    ]
    lines += ["  grit test --ckpt_path runs/mine/checkpoints/last.ckpt", ""]
    return "\n".join(lines)
