"""Reading what a source holds: configurations, tokenizers and weights, never code."""

from __future__ import annotations

import copy
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from grit_lightning.backbones.kinds import require_causal
from grit_lightning.backbones.sources import HOW_TO_POINT, BackboneSource
from grit_lightning.errors import FileAccessError, InvalidValueError


def read_pretrained(
    auto_class: Any, what: str, source: BackboneSource, revision: str | None = None, **options: Any
) -> Any:
    """Call `auto_class.from_pretrained`, and say what was tried if it fails.

    Args:
        auto_class: One of transformers' Auto classes.
        what: What it reads, for the message.
        source: Where it reads.
        revision: As for `load_backbone`.
        **options: More arguments.

    Raises:
        OSError: If nothing can be read.
    """
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
    if revision is not None:
        options["revision"] = revision
    try:
        return auto_class.from_pretrained(source.location, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        expected, got = f"files in {source} that can be read", "an error"
        if source.kind == "hub":
            local = os.path.abspath(source.location)
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
            version = f" at revision {revision}" if revision else ""
            expected = f"a local folder {local}, or {source.location!r}{version} in the local cache or on the hub"
            got = f"neither{offline}"
        raise FileAccessError(
            f"Cannot load the {what}: expected {expected}, got {got}: {str(error).strip()}\n{HOW_TO_POINT}"
        ) from error


def read_configuration(source: BackboneSource, revision: str | None = None) -> PreTrainedConfig:
    """Read the configuration of a backbone.

    Args:
        source: Not an instance.
        revision: As for `load_backbone`.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not that of a causal language model.
    """
    if source.gguf_file is None:
        config: PreTrainedConfig = read_pretrained(AutoConfig, "backbone", source, revision)
    else:
        file = os.stat(Path(source.location, source.gguf_file))
        config = copy.deepcopy(_gguf_configuration(source, (file.st_mtime_ns, file.st_size, file.st_ino)))
    require_causal(config, getattr(config, "architectures", None) or [])
    return config


@lru_cache(maxsize=1)  # seconds: transformers reads the header of a GGUF file token by token
def _gguf_configuration(source: BackboneSource, version: tuple[int, ...]) -> Any:
    return read_pretrained(AutoConfig, "backbone", source)


def check_revision(source: BackboneSource, revision: str | None) -> None:
    """Check that only a hub id is given a revision.

    Raises:
        ValueError: If another source is.
    """
    if revision is not None and source.kind != "hub":
        raise InvalidValueError(
            f"revision: expected null, as only hub ids have revisions and the backbone is {source}, got {revision!r}. Leave it "
            "unset."
        )
