"""Settings that were changed and that nothing reads, said once, so that no sweep over them is flat without a word."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn


def warn_if_ignored(owner: type, given: Mapping[str, object], readers: Mapping[str, str]) -> None:
    """Warn of settings that differ from their defaults although nothing reads them; on the first process only.

    Args:
        owner: Class whose constructor takes the settings.
        given: Its arguments, by name; those that are left out count as unchanged.
        readers: By the name of a setting that nothing reads as things stand, what would read it.
    """
    arguments = inspect.signature(owner).parameters
    for name, reader in readers.items():
        if name in given and given[name] != arguments[name].default:
            rank_zero_warn(
                f"{owner.__name__}.{name}: expected {arguments[name].default!r}, its default, as nothing reads it here, got "
                f"{given[name]!r}. It acts with {reader}."
            )
