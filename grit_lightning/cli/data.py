"""`grit data`: what a model will see of the data of a run, before it is run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console

from grit_lightning.cli.plain_parser import FitWordsParser
from grit_lightning.cli.run_words import settle
from grit_lightning.cli.terminal import usage_error

SPLITS = ("train", "validation", "test")


def data_command(words: Sequence[str]) -> None:
    """Run `grit data` with these command-line words."""
    parser = FitWordsParser(
        "grit data", "Show what a model will see of the data: rows, lengths, batches, and what is amiss."
    )
    parser.add_argument(
        "--show", type=int, default=3, metavar="N", help="Rows to show, with what is learnt in colour; 3 by default."
    )
    parser.add_argument("--split", choices=SPLITS, default="train", help="Where to take them from; train by default.")
    parser.add_argument("--json", action="store_true", help="Print everything as JSON.")
    own, rest = parser.split(words)
    if own.show < 0:
        usage_error(f"--show: expected a number of at least 0, got {own.show}.")
    settled = settle("fit", rest)

    from grit_lightning.cli.data_report import data_report  # imports torch, which the errors above can do without
    from grit_lightning.cli.settings_only import SettingsCLI

    report = data_report(SettingsCLI(settled), own.show, own.split)
    if own.json:
        sys.stdout.write(json.dumps(report, ensure_ascii=False, indent=2) + "\n")
        return
    from grit_lightning.cli.data_page import print_report

    print_report(Console(), report)
