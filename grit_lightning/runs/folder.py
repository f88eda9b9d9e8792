"""The folder of one run: which files belong to it, whether it is taken, how it is cleared."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

from grit_lightning.errors import FileTakenError, NotAFolderError

CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
RUNS = Path("runs")
CONFIG = "config.yaml"
EVENTS = ("ranks.jsonl", "reprojections.jsonl", "forgetting.jsonl", "retention.jsonl")
EVALUATIONS = ("generations-*.jsonl", "harness-*.json")
FILES_OF_A_RUN = (
    CONFIG,
    "hparams.yaml",
    "metrics.jsonl",
    "summary.json",
    *EVENTS,
    *EVALUATIONS,
    "events.out.tfevents.*",
    CHECKPOINTS,
)


def run_files(folder: Path) -> list[Path]:
    """Return the files and folders inside `folder` that a run has written; empty if there is none."""
    return sorted(path for pattern in FILES_OF_A_RUN for path in folder.glob(pattern))


def require_free(folder: Path) -> None:
    """Check that no run would be overwritten.

    Raises:
        FileExistsError: The folder already holds a run.
        NotADirectoryError: It is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotAFolderError(
            f"--output: expected a folder to create or fill, got {folder}, which is a file. Choose another."
        )
    if found := [path.name for path in run_files(folder)]:
        raise FileTakenError(
            f"--output: expected a folder without a run, got {folder}, which already holds one ({', '.join(found)}). Choose "
            "another, replace the run with --overwrite, or resume it with "
            f"--ckpt_path {folder / CHECKPOINTS / LAST}."
        )


def clear(folder: Path) -> None:
    """Remove the files of a run, nothing else that may lie in the folder, and the folder if it is empty then."""
    for path in run_files(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def default_folder(configs: Iterable[str], seed: object, stage: str = "fit") -> Path:
    """Return the folder of a run that names none: the same on every process and every time, so no clock is in its name.

    Args:
        configs: Names or paths of its configurations.
        seed: Its `seed_everything`.
        stage: Subcommand; all but `fit` are appended.
    """
    names = "+".join(Path(config).stem for config in configs) or "run"
    return RUNS / f"{names}-seed{seed}{'' if stage == 'fit' else f'-{stage}'}"


def run_folder_of(checkpoint: Path) -> Path | None:
    """Return the run folder whose `checkpoints/` holds this checkpoint, None if it lies elsewhere."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == CHECKPOINTS and (folder.parent / CONFIG).is_file() else None


def resume_command(folder: Path) -> str:
    """Return the command that goes on with the run of this folder; `{checkpoint}` stands for the checkpoint's path."""
    config = shlex.quote(str(folder / CONFIG)).replace("{", "{{").replace("}", "}}")
    return f"grit fit --config {config} --ckpt_path {{checkpoint}}"
