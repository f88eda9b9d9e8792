"""The shipped configurations, found by name: `demo`, `boolq`, `ablations/no_kfac`."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def shipped_configs() -> dict[str, Path]:
    """Return every shipped YAML file by the name that `--config` accepts, sorted by name."""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def find_config(name: str) -> Path:
    """Find a configuration.

    Args:
        name: A path to a file, or the name of a shipped configuration with or without `.yaml`. A file wins over a name.

    Raises:
        FileNotFoundError: If it is neither; the message lists the shipped names.
    """
    shipped = shipped_configs()
    if Path(name).is_file():
        return Path(name)
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    raise FileNotFoundError(
        f"--config {name}: neither a file nor a shipped configuration. Shipped are: {', '.join(shipped)}."
    )
