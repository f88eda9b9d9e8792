"""The shipped configurations, found by name: `demo`, `boolq`, `ablations/no_kfac`.

A file may extend others by a key `extends` at its top, which holds a name or a list of names. Whoever gives

    --config paper/boolq

gives `--config shared/paper --config paper/boolq`: the extended file comes first, and the file is laid over it.
"""

from __future__ import annotations

from pathlib import Path

import yaml  # type: ignore[import-untyped]

from grit_lightning.errors import InvalidValueError, MissingFileError, did_you_mean

FOLDER = Path(__file__).resolve().parent
EXTENDS = "extends"


def shipped_configs() -> dict[str, Path]:
    """Return every shipped YAML file by the name that `--config` accepts, sorted by name."""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def find_config(name: str, folder: Path | str = "") -> Path:
    """Find a configuration.

    Args:
        name: A path to a file, or the name of a shipped configuration with or without `.yaml`. A file wins over a name.
        folder: Where a relative path starts; the working folder if not given.

    Raises:
        FileNotFoundError: If it is neither; suggests a shipped name, and lists them all.
    """

    def without_folder(known: str) -> str:
        return known.rpartition("/")[2]

    shipped = shipped_configs()
    if (path := Path(folder, name)).is_file():
        return path
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    suggestion = did_you_mean(name, shipped) or did_you_mean(name, shipped, without_folder)
    raise MissingFileError(
        f"{name}: expected a file or the name of a shipped configuration, got neither.{suggestion} "
        f"Shipped are {', '.join(shipped)}."
    )


def with_extended(path: Path) -> list[Path]:
    """Return the files that a configuration extends, directly or through others, in the order to apply them, itself last.

    Raises:
        FileNotFoundError: If a file extends something that is not there.
        ValueError: If a file extends itself, or `extends` is not made of names.
    """
    return _collect(path, ())


def _collect(path: Path, extending: tuple[Path, ...]) -> list[Path]:
    chain = (*extending, path.resolve())
    if path.resolve() in extending:
        raise InvalidValueError(
            f"{path}: expected `extends` to lead to other files, got {' → '.join(map(str, chain))}. Take it out of one of them."
        )
    files: list[Path] = []
    for name in _names(path):
        try:
            files += _collect(find_config(name, path.parent), chain)
        except FileNotFoundError as error:
            raise MissingFileError(f"{path} extends {error}") from error
    return list(dict.fromkeys([*files, path]))


def _names(path: Path) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:  # which the parser says better, with the option's name
        return []
    given = content.get(EXTENDS, []) if isinstance(content, dict) else []
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidValueError(
            f"{path}: expected the name of a configuration or a list of names under `extends`, got {given!r}."
        )
    return names
