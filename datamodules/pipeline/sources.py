"""Where rows come from: the hub, a folder, a file, or a Python package that ships the data.

Everything ends as a memory-mapped `datasets.Dataset`, so a table is never a Python list. Local files are converted once
into the datasets cache (keyed by their content, guarded by a file lock); parallel processes share it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from grit_lightning.datamodules.pipeline.arrow_files import read_parquet, write_table
from grit_lightning.datamodules.pipeline.delimited import read_delimited
from grit_lightning.datamodules.pipeline.json_files import read_json
from grit_lightning.datamodules.pipeline.text_files import PLAIN_TEXT, files_hash, format_of
from grit_lightning.datamodules.pipeline.token_cache import read_or_make, settings_hash
from grit_lightning.errors import DownloadError, InvalidValueError, MissingFileError

Reader = Callable[[Sequence[Path]], tuple[pa.Schema, Iterator[pa.Table]]]
READERS: Mapping[str, Reader] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
    ".csv": read_delimited,
    ".tsv": read_delimited,
}
"""What reads the files of an ending; any of them but parquet may also end in .gz."""

FORMAT = 1
"""Version of what the readers make of the same files: raise it when that changes."""

SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def read_files(files: Sequence[Path], readers: Mapping[str, Reader] = READERS) -> datasets.Dataset:
    """Read files of one kind into one table, whose texts are those of the files, character for character.

    Args:
        files: jsonl, json, parquet, csv or tsv files with the same columns; any but parquet also compressed, as .gz.
        readers: What reads the files of an ending.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Unknown file type, an empty file, or content that cannot be read; with the row or line.
        OSError: The cache cannot be written.
    """
    for file in files:
        if not file.is_file():
            raise MissingFileError(
                f"source: expected a folder or file of data, got {file}, which does not exist. Set it to one that does."
            )
        if format_of(file) not in readers:
            raise InvalidValueError(
                f"{file}: expected a file that ends in one of {', '.join(readers)}, got {file.suffix or 'no ending'}. "
                "Convert it, or change `source`."
            )
    kinds = {PLAIN_TEXT[0] if format_of(file) in PLAIN_TEXT else format_of(file) for file in files}
    if len(kinds) > 1:
        raise InvalidValueError(
            f"{files[0].parent}: expected files of one type in a split, got {sorted(kinds)}. Set `source` to one file."
        )
    kind = kinds.pop()
    reader = readers[kind]

    def write(path: Path) -> None:
        schema, tables = reader(files)
        write_table(path, schema, _at_least_one_row(tables, files))

    # Known by their content: times of files are not, as those of unpacked archives and of copies show.
    settings = {"settings": reader.keywords} if isinstance(reader, partial) else {}
    key = settings_hash({"format": FORMAT, "kind": kind, "files": files_hash(files), **settings})
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "grit_lightning" / "tables"
    return read_or_make(folder, re.sub(r"\W+", "_", files[0].stem), key, write, "HF_DATASETS_CACHE")


def find_files(
    source: Path, split: str, config: str | None = None, readers: Mapping[str, Reader] = READERS
) -> list[Path]:
    """Find the files of one split in a folder, or take a single file.

    A file belongs to a split by its name, `train.jsonl`, `dev.tsv`, `validation-00000-of-00001.parquet`, or by that of its
    folder, `test/a.txt`. A folder is searched with its subfolders, or only in the subfolder named as the hub configuration if
    there is one. What begins with a dot or an underscore, and all below such a folder, is left aside: `.ipynb_checkpoints`,
    `.git`, `__MACOSX`, `_temp`. Where no file says its split, all of them are the training split.

    Args:
        source: Folder or file.
        split: "train", "validation" or "test".
        config: Name of the hub configuration, such as "main" or "qnli".
        readers: What reads the files of an ending; files with others are left aside in a folder.

    Returns:
        The files in the order of their names; none if the source does not hold that split.

    Raises:
        FileNotFoundError: `source` does not exist, or is a folder without data files.
        ValueError: A folder has a whole split twice, as in `train.jsonl` beside `train_old.jsonl`.
    """
    if not source.exists():
        raise MissingFileError(
            f"source: expected a folder with split files, one file ({', '.join(readers)}) or pypi:<package>, got "
            f"{str(source)!r}, which does not exist. Change it, or leave it out to use the hub."
        )
    root = source if config is None or not (source / config).is_dir() else source / config
    if source.is_file():
        files = [source]
    else:
        files = _data_files(root, readers)
        if not files:
            raise MissingFileError(
                f"source: expected a folder with data files ({', '.join(readers)}), got {source}, which holds none."
            )
    splits = {file: _split_of(file, root) for file in files}
    if split == "train" and not any(splits.values()):
        return files
    chosen = [file for file in files if splits[file] == split]
    if len(chosen) > 1:
        _require_parts(chosen, split, source)
    return chosen


def left_aside(source: Path, config: str | None = None, readers: Mapping[str, Reader] = READERS) -> list[Path]:
    """Return the data files of a folder that belong to no split, because others say theirs and they do not."""
    if not source.is_dir():
        return []
    root = source / config if config and (source / config).is_dir() else source
    files = _data_files(root, readers)
    unnamed = [file for file in files if _split_of(file, root) is None]
    return unnamed if len(unnamed) < len(files) else []


def _require_parts(files: list[Path], split: str, source: Path) -> None:
    """Refuse a file that is a whole split by its name beside others of the split, such as an older copy of it."""
    whole = [file for file in files if file.name.lower().partition(".")[0] in SPLIT_NAMES[split]]
    if whole and len({format_of(file) for file in files}) == 1:  # files of several types are refused when they are read
        others = [str(file.relative_to(source)) for file in files if file != whole[0]]
        raise InvalidValueError(
            f"source: expected one file of the {split} split in {source}, or its numbered parts, got {whole[0].name} beside "
            f"{others}. Take away the files that are not meant, or set source to the one that is."
        )


def read_local(
    source: Path, split: str, config: str | None = None, readers: Mapping[str, Reader] = READERS
) -> datasets.Dataset | None:
    """Read one split of a folder or of a single file; None if `find_files` finds none.

    Raises:
        FileNotFoundError: As in `find_files`.
        ValueError: As in `read_files`.
    """
    files = find_files(source, split, config, readers)
    return read_files(files, readers) if files else None


def read_hub(hub_id: str, config: str | None, split: str | None, streaming: bool = False) -> Any:
    """Download one split from the hub, or read it from the local cache.

    Args:
        hub_id: Table on the hub.
        config: Its configuration.
        split: Name of the split there; None for all of them.
        streaming: Fetch rows as they are asked for, of a table that is too large to download; nothing is cached.

    Returns:
        A `datasets.Dataset`, or a `datasets.IterableDataset` if it is streamed; of all splits a mapping from their names.

    Raises:
        ConnectionError: The hub cannot be reached and nothing is cached; says what to download and how to point at it.
    """
    with quiet():
        try:
            return datasets.load_dataset(hub_id, config, split=split, streaming=streaming)
        except ValueError as error:  # of several configurations none is named, or one that is not there
            raise InvalidValueError(
                f"hub_config: expected the name of a configuration of {hub_id}, got {config!r}: {error} Set it."
            ) from error
        except (OSError, datasets.exceptions.DatasetNotFoundError) as error:  # all network errors are OSErrors
            folder = hub_id.rpartition("/")[2]
            raise DownloadError(
                f"Could not get {hub_id}{f' ({split})' if split else ''}: expected it on the hub or in the local cache, got "
                f"{error}. Where there is a network, run\n"
                f"    hf download {hub_id} --repo-type dataset --local-dir {folder}\n"
                f"copy the folder here and set `source` to it."
            ) from error


def split_named(name: str) -> str | None:
    """Return which split a name speaks of: `dev` of validation, `train_sft` of training; None if of none.

    Example:
        >>> split_named("train-00000-of-00002"), split_named("dev"), split_named("rows")
        ('train', 'validation', None)
    """
    first_word = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return next((split for split, names in SPLIT_NAMES.items() if first_word in names), None)


@contextmanager
def quiet() -> Iterator[None]:
    """Switch the progress bars of `datasets` off for a while: reading a table is not worth one."""
    enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()


def _data_files(root: Path, readers: Mapping[str, Reader]) -> list[Path]:
    return sorted(file for file in root.rglob("*") if format_of(file) in readers and not _is_set_aside(file, root))


def _is_set_aside(file: Path, root: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(root).parts)


def _split_of(file: Path, root: Path) -> str | None:
    """Return the split that a file's name speaks of, or the nearest of its folders below the root that is called after one."""
    whole_name = re.split(r"[\W_]*\d", file.stem.lower(), maxsplit=1)[0]
    text_only = format_of(file) in PLAIN_TEXT  # whose names are titles, such as training-plan.md
    if (named := split_named(file.stem)) and (not text_only or whole_name in SPLIT_NAMES[named]):
        return named
    folders = file.relative_to(root).parent.parts if file != root else ()
    known = {name: split for split, names in SPLIT_NAMES.items() for name in names}
    return next((known[folder.lower()] for folder in reversed(folders) if folder.lower() in known), None)


def _at_least_one_row(tables: Iterator[pa.Table], files: Sequence[Path]) -> Iterator[pa.Table]:
    empty = True
    for table in tables:
        empty = empty and not len(table)
        yield table
    if empty:
        names = ", ".join(map(str, files))
        raise InvalidValueError(f"{names}: expected rows under the task's columns, got none. Change `source`.")
