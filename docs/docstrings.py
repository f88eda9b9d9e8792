"""Our docstrings, as the documentation site reads them; a Griffe extension."""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Object

_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
_ATTRIBUTES = re.compile(r"^( *)Attributes:$", re.MULTILINE)


class HouseStyle(Extension):
    """Shows doctests as code, and the fields of a dataclass as the settings that they are, with their defaults."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rename the sections that Griffe would take for something else."""
        if obj.docstring is None:
            return
        obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
        if isinstance(obj, Class) and any(each.callable_path == "dataclasses.dataclass" for each in obj.decorators):
            obj.docstring.value = _ATTRIBUTES.sub(r"\1Args:", obj.docstring.value)
