"""The `grit` program: which subcommand is run.

`fit`, `validate`, `test` and `predict` are one LightningCLI. The others need no Trainer and have parsers of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from grit_lightning.cli.eval_harness import harness_command
from grit_lightning.cli.export import export_command
from grit_lightning.cli.prepare import prepare_command
from grit_lightning.cli.run import GritCLI
from grit_lightning.cli.terminal import one_line_errors, silence_known_noise
from grit_lightning.runs.signals import ended_by_signals

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "eval-harness": harness_command,
    "export": export_command,
    "prepare": prepare_command,
}


def main(args: list[str] | None = None) -> None:
    """Run the program.

    Args:
        args: Command-line words; those of the process when None.
    """
    silence_known_noise()
    words = sys.argv[1:] if args is None else args
    command = COMMANDS.get(words[0]) if words else None
    with one_line_errors(), ended_by_signals():
        if command is None:
            GritCLI(words)
        else:
            command(words[1:])
