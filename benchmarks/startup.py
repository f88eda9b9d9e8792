"""How long the first word takes: seconds from the start of Python to its end, side by side, in one table from one run.

    python benchmarks/startup.py [--before DIR] [--repeats 5] [--json FILE]

Every command runs in a new process, all of them in turn and then again, so that a machine that slows down slows all of them.
One round before the first is not counted: it compiles and caches. The table holds medians, and their ratio to that of `import
torch`. `--before` measures another checkout beside this one. On two cores, five rounds of two checkouts take ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
PROGRAM = "from grit_lightning.cli import main; main({})"
COMMANDS = {
    "import grit_lightning": "import grit_lightning",
    "from grit_lightning import GritLitModule": "from grit_lightning import GritLitModule",
    "grit --help": PROGRAM.format(["--help"]),
    "grit fit --config dmo": PROGRAM.format(["fit", "--config", "dmo"]),
    "grit fit": PROGRAM.format(["fit"]),
    "grit fit --config demo --trainer.max_stepps 5": PROGRAM.format(
        ["fit", "--config", "demo", "--trainer.max_stepps", "5"]
    ),
}
REFERENCE = "import torch"


def seconds(code: str, root: Path, folder: str) -> float:
    """Seconds that a new process takes for some code, with the package of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, check=False)
    took = time.perf_counter() - start
    if done.returncode not in (0, 1, 2) or b"Traceback" in done.stderr:
        raise SystemExit(f"{code} in {root}\n{done.stderr.decode()}")
    return took


def main() -> None:
    """Measure, and show the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=Path, help="Another checkout to measure beside this one.")
    parser.add_argument("--repeats", type=int, default=5, help="Counted rounds.")
    parser.add_argument("--json", type=Path, help="File for all seconds.")
    given = parser.parse_args()
    checkouts = {"before": given.before.resolve()} if given.before else {}
    checkouts["now"] = HERE
    cases = {(name, when): (code, root) for name, code in COMMANDS.items() for when, root in checkouts.items()}
    cases[REFERENCE, ""] = (REFERENCE, HERE)
    taken: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.repeats + 1):
            for case, (code, root) in cases.items():
                took = seconds(code, root, folder)
                if turn:
                    taken[case].append(took)
    medians = {case: statistics.median(values) for case, values in taken.items()}
    torch = medians[REFERENCE, ""]
    print(f"{'command':48}" + "".join(f"{when:>20}" for when in checkouts))
    print(f"{REFERENCE:48}" + f"{torch:13.2f} s = 1.00" * len(checkouts))
    for name in COMMANDS:
        cells = (f"{medians[name, when]:13.2f} s = {medians[name, when] / torch:4.2f}" for when in checkouts)
        print(f"{name:48}" + "".join(cells))
    if given.json:
        rows = [{"command": name, "checkout": when, "seconds": values} for (name, when), values in taken.items()]
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
