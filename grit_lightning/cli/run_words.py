"""The words of `grit fit|validate|test|predict`, as far as they can be understood before torch is imported.

Configurations must be there, and so must the checkpoint, which may be called `last`. Data must be named, if not by the words
then by the `config.yaml` of the checkpoint's run. Everything else is the business of the full parser in `run.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]

from grit_lightning.cli.terminal import usage_error
from grit_lightning.configs import find_config, with_extended
from grit_lightning.errors import InputError, InvalidValueError, MissingFileError
from grit_lightning.runs.folder import CHECKPOINTS, CONFIG, LAST, default_folder, run_folder_of

SUBCOMMANDS = {
    "fit": "Train an adapter, and evaluate it before and after if --evaluate_before_fit is set.",
    "validate": "Evaluate on the validation data.",
    "test": "Evaluate on the test data, with generated answers if --model.generation is set.",
    "predict": "Generate answers to the prediction data.",
}
"""What a Trainer does, and what each does."""
DEFAULT_SEED = 42
_LIGHTNINGS_NAMES = ("hpc", "registry")
"""Checkpoints that Lightning finds by itself; what follows a colon is up to it."""


def settle(subcommand: str, words: Sequence[str]) -> list[str]:
    """Check what can be checked, and return the words with the checkpoint's path and its run's configuration in them.

    Args:
        subcommand: `fit`, `validate`, `test` or `predict`.
        words: What follows it.

    Raises:
        InputError: A configuration, the checkpoint or the data are missing; a configuration that is not there exits with
            status 2, as every error in the words does.
    """
    given = GivenWords(words)
    if given.asks_for_help:
        return list(words)
    settled = list(words)
    checkpoint = given.setting("ckpt_path")
    if checkpoint == "last":
        checkpoint = str(last_checkpoint(given))
        settled.append(f"--ckpt_path={checkpoint}")
    elif checkpoint and checkpoint.partition(":")[0] not in _LIGHTNINGS_NAMES:
        _require_checkpoint(Path(checkpoint))
    if given.names_data:
        return settled
    run = run_folder_of(Path(checkpoint)) if checkpoint else None
    if run is not None and GivenWords([f"--config={run / CONFIG}"]).names_data:
        return [f"--config={run / CONFIG}", f"--output={run}", *settled]
    where = ", since the checkpoint lies in no run folder with a config.yaml" if checkpoint else ""
    raise InvalidValueError(f"no data: add --config or --data{where}. `grit --help` lists the shipped configurations.")


def named_checkpoint(checkpoint: str, configs: Sequence[str]) -> str:
    """Return the path of a checkpoint, or of the last one of the run with these configurations if it is called `last`.

    Raises:
        MissingFileError: There is no such checkpoint.
    """
    if checkpoint == "last":
        return str(last_checkpoint(GivenWords([f"--config={name}" for name in configs])))
    _require_checkpoint(Path(checkpoint))
    return checkpoint


def _require_checkpoint(path: Path) -> None:
    if str(path) == "best":
        raise InvalidValueError("--ckpt_path: expected a path or `last`, got `best`, which nothing has trained yet.")
    if not path.is_file():
        found = "which is a folder" if path.is_dir() else "which does not exist"
        raise MissingFileError(f"--ckpt_path: expected a checkpoint, got {path}, {found}.")


def last_checkpoint(given: GivenWords) -> Path:
    """Find what `--ckpt_path last` means: the last checkpoint of the run that the words name.

    The run is in the folder of `--output`, in that of a `config.yaml` that a run has written, or where a `fit` with the same
    configurations and the same seed would write.

    Raises:
        MissingFileError: The words name no run, or it has no such checkpoint.
    """
    folder = given.run_folder
    if folder is None:
        raise MissingFileError("--ckpt_path last: expected --output or --config to name the run, got neither.")
    path = folder / CHECKPOINTS / LAST
    if not path.is_file():
        raise MissingFileError(
            f"--ckpt_path last: expected {path}, got no such file. Name the run with --output or --config, or give the "
            "checkpoint's path."
        )
    return path


class GivenWords:
    """What a few options say, on the command line and in the configurations, the command line first.

    Args:
        words: Command-line words without the subcommand.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """Read the words, and the configurations that they name with those that these extend."""
        self.words = list(words)
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.error = _missing_value  # type: ignore[method-assign]
        finder.add_argument("-c", "--config", action="append", default=[])
        for name in ("ckpt_path", "output", "data", "seed_everything", "trainer.default_root_dir"):
            finder.add_argument(f"--{name}")
        self.options = vars(finder.parse_known_args(self._without_help())[0])
        self.configs: list[str] = self.options.pop("config")
        self.contents = [content for name in self.configs for content in _contents(name)]

    @property
    def asks_for_help(self) -> bool:
        """Whether the options or the settings are to be shown, and nothing is to be run."""
        return len(self._without_help()) < len(self.words) or any(w.startswith("--print_config") for w in self.words)

    def _without_help(self) -> list[str]:
        return [
            word for word in self.words if word not in ("-h", "--help") and not word.partition("=")[0].endswith(".help")
        ]

    def setting(self, name: str) -> Any:
        """Return what was given last, None if nothing was."""
        if (option := self.options.get(name)) is not None:
            return None if option == "null" else option
        for content in reversed(self.contents):
            value: Any = content
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                return value
        return None

    @property
    def names_data(self) -> bool:
        """Whether a data module is chosen; settings of one do not choose it."""
        given = [self.options["data"], *(content.get("data") for content in self.contents)]
        chosen = [data.get("class_path") if isinstance(data, dict) else data for data in given]
        return any(chosen) or any(word.startswith("--data.class_path") for word in self.words)

    @property
    def run_folder(self) -> Path | None:
        """Where the run is that these words name; None if they name none."""
        if self.options["output"] not in (None, "null"):
            return Path(self.options["output"])
        for path in reversed([Path(name) for name in self.configs]):
            if path.name == CONFIG and (path.parent / CHECKPOINTS).is_dir():
                return path.parent
        if chosen := self.setting("output") or self.setting("trainer.default_root_dir"):
            return Path(chosen)
        if not self.configs:
            return None
        seed = self.setting("seed_everything")
        return default_folder(self.configs, DEFAULT_SEED if seed is None else seed)


def _missing_value(message: str) -> NoReturn:
    """Say which of the options read here lacks its value; nothing else can be wrong with them."""
    option = message.removeprefix("argument ").partition(":")[0].rpartition("/")[2]
    usage_error(f"{option}: expected a value, got none.")


def _contents(name: str) -> list[dict[str, Any]]:
    try:
        texts = {path: path.read_text(encoding="utf-8") for path in with_extended(find_config(name))}
    except (InputError, OSError, UnicodeDecodeError) as error:
        usage_error(f"--config {error}")
    contents = []
    for path, text in texts.items():
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            usage_error(f"--config {path}: expected YAML, got what cannot be parsed: {_on_one_line(error)}")
        if not isinstance(content, dict | None):
            usage_error(f"--config {path}: expected settings by name, got {type(content).__name__}.")
        contents.append(content or {})
    return contents


def _on_one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return f"{problem}." if mark is None else f"{problem} in line {mark.line + 1}, column {mark.column + 1}."
