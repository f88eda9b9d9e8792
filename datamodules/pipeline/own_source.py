"""Where a person's own rows are: a file, a folder, or a table on the hub that no task of ours knows."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from grit_lightning.datamodules.pipeline.sources import READERS, Reader, read_hub, split_named
from grit_lightning.datamodules.pipeline.task_table import TaskTable
from grit_lightning.errors import DownloadError, InvalidValueError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def own_table(
    task: str,
    source: str | None,
    schema: Sequence[str] = (),
    *,
    hub_config: str | None = None,
    required: Collection[str] | None = None,
    readers: Mapping[str, Reader] = READERS,
    **settings: Any,
) -> TaskTable:
    """Return the table of rows behind a source.

    Args:
        task: What the rows are for, for messages.
        source: A file, a folder, or a hub id (`owner/name`, where no file or folder has that name).
        schema: Columns that are read.
        hub_config: Configuration of the hub id.
        required: Those that the source has to have; None for all.
        readers: What reads the files of an ending.
        **settings: As for `TaskTable`.

    Raises:
        ValueError: There is no source, or it is a package.
        ConnectionError: It is on the hub, which cannot be reached.
    """
    if source is None or source.startswith("pypi:"):
        raise InvalidValueError(
            f"source: expected a file ({', '.join(readers)}), a folder of such files, or a hub id, got {source!r}. Set "
            "data.source to your data."
        )
    common: dict[str, Any] = {"test_split": "test", "required": required, "readers": readers, **settings}
    if not is_hub_id(source, readers):
        return TaskTable(task, source, schema, None, None, **common)
    try:
        splits = read_hub(source, hub_config, None)
    except DownloadError as error:
        raise DownloadError(
            f"source: expected a file or folder that is there, or a hub id, got {source!r}, and there is no such file. {error}"
        ) from error
    named = {split: name for name in reversed(list(splits)) if (split := split_named(name))}
    named = named or {"train": next(iter(splits))}
    return TaskTable(task, None, schema, source, hub_config, named, **common)


def is_hub_id(source: str, readers: Collection[str] = READERS) -> bool:
    """Return whether a source is meant as a table on the hub: `owner/name`, and no file or folder of that name is there.

    Example:
        >>> is_hub_id("HuggingFaceH4/no_robots"), is_hub_id("data/mine.jsonl"), is_hub_id("./mine")
        (True, False, False)
    """
    path = Path(source).expanduser()
    return bool(_HUB_ID.fullmatch(source)) and not path.exists() and path.suffix not in {*readers, ".gz"}
