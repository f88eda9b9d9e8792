"""Token ids on disk: made once, read back memory-mapped, by any number of processes.

A file's name holds a hash of everything that its content depends on, so a change of data or settings makes another file and
nothing is ever out of date. Files appear by renaming, so there are no half-written ones; a lock lets one process write while
the others wait.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from grit_lightning.errors import FileAccessError

_ROWS_AT_ONCE = 1000


def read_or_make(
    folder: Path, name: str, key: str, make: Callable[[Path], object], setting: str = "cache_dir"
) -> datasets.Dataset:
    """Read a table from the cache, or make it.

    Args:
        folder: Where the cache is.
        name: What the table is, for the file's name.
        key: Hash of what it depends on.
        make: Writes the table to the path it is given, whole or not at all.
        setting: What says where the cache is, for messages.

    Returns:
        The table, memory-mapped.

    Raises:
        OSError: The folder cannot be written; names the setting to change.
    """
    file = folder / f"{name}-{key[:32]}.arrow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if file.is_file():
                try:
                    return datasets.Dataset.from_file(str(file))
                except pa.ArrowInvalid:  # damaged, by a full disk or a broken copy
                    file.unlink()
            make(file)
    except OSError as error:
        raise FileAccessError(
            f"{setting}: expected a folder that can be written to, got {folder}: {error}. Set it to another."
        ) from error
    return datasets.Dataset.from_file(str(file))


def content_hash(table: datasets.Dataset) -> str:
    """Return a hash of the values of a table, column names and types included, whatever files they came from."""
    digest = hashlib.sha256(str(table.features).encode())
    for batch in table.iter(_ROWS_AT_ONCE):  # Arrow's own bytes depend on how a table is cut into chunks
        digest.update(json.dumps(batch, default=repr).encode())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what a tokenizer does to a text: vocabulary, merges, normalisation, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template]
    return settings_hash(
        {"class": type(tokenizer).__name__, "content": content, "special": special, "empty": tokenizer("").input_ids}
    )


def source_hash(cls: type, base: type) -> str:
    """Return a hash of the code of a class and its parents below `base`, and of all else in the files they stand in."""
    texts = []
    for parent in cls.__mro__[: cls.__mro__.index(base)]:
        try:
            texts += [parent.__qualname__, inspect.getsource(sys.modules[parent.__module__])]
        except (OSError, TypeError, KeyError):  # typed into an interpreter or a notebook: no file to read
            methods = {name: value for name, value in vars(parent).items() if inspect.isfunction(value)}
            texts.append(datasets.fingerprint.Hasher.hash(methods))  # with the globals that they use
    return settings_hash({"source": texts})


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Return a hash of plain values under their names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
