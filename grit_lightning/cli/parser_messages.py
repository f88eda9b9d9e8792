"""What the full parser says is wrong, as one sentence.

jsonargparse reports everything that it has tried: for every alternative of a type the whole tree below it. Its message is read
here into the leaves of that tree. A leaf that names a mistake (an unknown setting, a class that cannot be imported) is the
explanation; if all leaves only say which types do not fit, the innermost type is. What is not understood is shown as it is.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser

from grit_lightning.errors import did_you_mean

_PLAIN = {"bool": "true or false", "int": "an integer", "float": "a number", "str": "a text", "NoneType": "null"}
_PLAIN |= {"list": "a list in brackets", "tuple": "a list in brackets", "dict": "settings by name"}
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_NO_NAMES = ("builtins", "collections", "typing", "torch.Tensor")
_MISMATCH = re.compile(
    r"Expected a (<class '[\w.]+'>|typing\..*|path .*|dot import path string: .*)|Not a valid subclass"
)
_BOILERPLATE = re.compile(r"(Does not validate|Errors:|Given value|Subclass types expect|a class path \(|a dict with)")
_UNKNOWN = re.compile(
    r"unrecognized arguments: (?:--)?(\S+?)(?:=.*|$)|"
    r"Option '([^']+)' is not accepted|does not accept option '([^']+)'|unrecognized arguments: (?:--)?(\S+) "
)


@dataclass(frozen=True)
class Explanation:
    """What is wrong with the words.

    Attributes:
        sentence: What was expected, what was given, and what was probably meant.
        known: All names that could stand there; empty where there is nothing to choose from.
        help: Option that shows what could be written.
    """

    sentence: str
    known: tuple[str, ...] = ()
    help: str = "--help"


@dataclass
class _Leaf:
    """An innermost line of a message, and what it is inside of."""

    text: str
    keys: list[str] = field(default_factory=list)
    class_path: str = ""
    types: str = ""
    given: str = ""

    @property
    def setting(self) -> str:
        return ".".join(self.keys)


def explain(message: str, options: Mapping[str, str], words: Iterable[str] = ()) -> Explanation | None:
    """Return what a parser's message comes down to; None if it is not understood.

    Args:
        message: Message of jsonargparse.
        options: Options that the parser knows, with their dashes, and their types.
        words: The command line, to name the option that lacks its value.
    """
    if (lacking := re.match(r"argument (\S+): expected (?:one|at least one) argument", message)) is not None:
        option = _option_without_value(lacking.group(1), list(words))
        return Explanation(f"{option}: expected a value, got none.", tuple(_class_names(options.get(option, ""))))
    if (helped := re.match(r"(--\S+\.help): Expected a dot import path string: (\S+)", message)) is not None:
        names = _class_names(options.get(helped.group(1), ""))
        return Explanation(
            f"{helped.group(1)}: expected the name or import path of a class, got {helped.group(2)!r}."
            f"{did_you_mean(helped.group(2), names)}",
            tuple(names),
        )
    leaves = list(_leaves(message))
    for leaf in leaves:
        for explained in (_unknown_setting, _missing_settings, _unusable_class):
            if (explanation := explained(leaf, options)) is not None:
                return explanation
    mismatches = [leaf for leaf in leaves if leaf.keys and _MISMATCH.match(leaf.text)]
    if leaves and len(mismatches) == len(leaves):
        return _wrong_type(max(mismatches, key=lambda leaf: len(leaf.keys)), leaves)
    return None


def _option_without_value(names: str, words: list[str]) -> str:
    option = next((name for name in names.split("/") if name.startswith("--")), names)
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith(f"{option}.") and "=" not in word and after.startswith("--"):
            return word
    return option


def _leaves(message: str) -> Iterator[_Leaf]:
    """Go through the lines of a message; what stands further right belongs to what stands above it, further left."""
    heads: list[tuple[int, str, str]] = []
    leaves: list[tuple[int, _Leaf]] = []
    for line in filter(str.strip, message.splitlines()):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        while text.startswith("- "):
            text, indent = text[2:], indent + 2
        heads = [head for head in heads if head[0] < indent]
        if (given := re.match(r"Given value: (?:NestedArg\(key='[^']*', val='?(.*?)'?\)|(.*))$", text)) is not None:
            for depth, leaf in leaves:
                if depth >= indent:
                    leaf.given = leaf.given or given.group(1) or given.group(2) or ""
        elif (
            head := re.search(r"(Parser key|given class_path) [\"']([^\"']+)[\"']:$|^(Subtypes): (.*)", text)
        ) is not None:
            opens_column = head.group(3) is not None  # what the types are of stands in the same column, below
            heads.append((indent - opens_column, head.group(1) or head.group(3), head.group(2) or head.group(4)))
        elif not _BOILERPLATE.match(text):
            text, _, value = text.partition(". Got value: ")
            keys = [name for _, kind, name in heads if kind == "Parser key"]
            owner = next((name for _, kind, name in reversed(heads) if kind == "given class_path"), "")
            types = heads[-1][2] if heads and heads[-1][1] == "Subtypes" else ""
            leaf = _Leaf(text, keys, owner, types, value)
            leaves.append((indent, leaf))
    yield from (leaf for _, leaf in leaves if not leaf.text.startswith("Expected a path but"))


def _unknown_setting(leaf: _Leaf, options: Mapping[str, str]) -> Explanation | None:
    found = _UNKNOWN.search(leaf.text)
    if found is None:
        return None
    name = next(group for group in found.groups() if group)
    if not leaf.class_path:
        if leaf.text.startswith("unrecognized") and "--" not in leaf.text:
            return Explanation(f"{name}: expected an option such as --config, got a word that belongs to none.")
        return Explanation(f"--{name}: there is no such option.{_did_you_mean_option(name, options)}")
    owner = leaf.class_path.rpartition(".")[2]
    settings = _settings_of(leaf.class_path)
    suggestion = did_you_mean(name.partition(".")[0], settings).replace("`", f"`{leaf.setting}.", 1)
    named = f" {owner}" if len(leaf.keys) == 1 else ""  # what is nested deeper knows its class
    return Explanation(
        f"{leaf.setting}.{name}: {owner} has no such setting.{suggestion}",
        () if suggestion else tuple(settings),
        help=f"--{leaf.setting}.help{named}",
    )


def _did_you_mean_option(name: str, options: Mapping[str, str]) -> str:
    """Suggest an option, or for `modell.r` the option `--model` that takes what follows."""
    known = list(options)
    whole = did_you_mean(f"--{name}", known)
    first, dot, rest = name.partition(".")
    beginnings = {option.partition(".")[0] for option in known}
    if dot and f"--{first}" not in beginnings and (start := did_you_mean(f"--{first}", beginnings)):
        return start.replace("`?", f".{rest}`?")
    return whole


def _missing_settings(leaf: _Leaf, options: Mapping[str, str]) -> Explanation | None:
    found = re.match(r"the following arguments are required: (.*)", leaf.text)
    if found is None:
        return None
    names = [f"--{'.'.join([*leaf.keys, name.strip()])}" for name in found.group(1).split(",")]
    return Explanation(f"{', '.join(names)}: expected a value, got none. Set it, or add a --config that does.")


def _unusable_class(leaf: _Leaf, options: Mapping[str, str]) -> Explanation | None:
    if not leaf.keys or _MISMATCH.match(leaf.text):
        return None
    path = leaf.class_path or leaf.given
    expected = f"{leaf.setting}: expected the name or import path of a class, got"
    if Path(path).suffix in _TABLES:
        return Explanation(f"{expected} the file {path!r}. Rows in a file go to --data.source.")
    if (found := re.match(r"No module named '([\w.]+)'", leaf.text)) is not None:
        place = f"in {os.getcwd()} or among the installed packages"
        return Explanation(f"{expected} {path!r}: there is no module {found.group(1)!r} {place}.")
    if (found := re.match(r"module '([\w.]+)' has no attribute '(\w+)'", leaf.text)) is not None:
        module, name = found.groups()
        names = [known for known, _ in inspect.getmembers(importlib.import_module(module), inspect.isclass)]
        return Explanation(f"{expected} '{module}.{name}': {module} has no {name}.{did_you_mean(name, names)}")
    if (found := re.match(r"Import path .*does not correspond to a subclass of (\w+)", leaf.text)) is not None:
        return Explanation(f"{expected} {leaf.given or path!r}, which is not derived from {found.group(1)}.")
    if (found := re.search(r"Expected '([\w.]+)' to be a subclass of <class '(\w+)'>", leaf.text)) is not None:
        return Explanation(f"{expected} {found.group(1)!r}, which is not derived from {found.group(2)}.")
    if leaf.text.startswith("Expected an instantiatable class") and leaf.text.endswith("is abstract"):
        lacking = sorted(getattr(_import(path), "__abstractmethods__", ()))
        return Explanation(f"{expected} {path!r}, which has yet to define {', '.join(lacking)}.")
    return Explanation(f"{expected} {path!r}: {leaf.text}.")


def _wrong_type(leaf: _Leaf, leaves: list[_Leaf]) -> Explanation:
    """Say what the innermost type takes."""
    types = leaf.types or leaf.text
    if leaf.class_path and leaf.text.startswith("Expected a dot import path"):
        types = leaf.types or _type_of(leaf.class_path, leaf.keys[-1])
    alike = [other for other in leaves if other.setting == leaf.setting]
    named = [other.text.rpartition(": ")[2] for other in alike if other.text.startswith("Expected a dot import path")]
    given = named[0] if named else leaf.given
    names = [*_literals(types), *_class_names(types)]
    return Explanation(
        f"{leaf.setting}: expected {_in_words(types)}, got {given!r}.{did_you_mean(given, names)}",
        tuple(names) if named and len(names) > 1 else (),
        help=f"--{'.'.join(leaf.keys[:-1])}.help" if leaf.class_path else "--help",
    )


def _in_words(types: str) -> str:
    """Return what can be written for these types."""
    bases = [base.rpartition(".")[2] for base in _classes(types)]
    words = [f"the name or import path of a class derived from {' or '.join(bases)}"] if bases else []
    if bases and re.search(r"(list|Iterable|Sequence)\[", types):
        words.append("a list of them")
    words += dict.fromkeys(_literals(types))
    plain = re.findall(r"<class '(\w+)'>", types)
    if not bases:
        plain = [*re.findall(r"\b(list|tuple|dict)\[", types), *plain]
    words += [_PLAIN[name] for name in plain if name in _PLAIN and not (bases and name == "NoneType")]
    return ", or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words) or types


def _literals(types: str) -> list[str]:
    return [
        str(value) for values in re.findall(r"Literal\[([^\]]*)\]", types) for value in ast.literal_eval(f"[{values}]")
    ]


def _classes(types: str) -> list[str]:
    """Return the import paths of the classes that are asked for by name."""
    without_arguments = re.sub(
        r"(typing\.)?Callable\[\[.*?\], ", "", types
    )  # of a callable, what it returns is asked for
    paths = re.findall(r"[a-zA-Z_]\w*(?:\.\w+)+", re.sub(r"Literal\[[^\]]*\]", "", without_arguments))
    return list(dict.fromkeys(path for path in paths if not path.startswith(_NO_NAMES)))


def _class_names(types: str) -> list[str]:
    """Return the names of all known classes of these types, each of which can be written without its module."""
    found: set[str] = set()

    def collect(kind: type[Any]) -> None:
        if not (inspect.isabstract(kind) or kind.__name__.startswith("_") or "<locals>" in kind.__qualname__):
            found.add(kind.__name__)
        for derived in kind.__subclasses__():
            collect(derived)

    for path in _classes(types):
        if inspect.isclass(base := _import(path)):
            collect(base)
    return sorted(found)


def _settings_of(class_path: str) -> list[str]:
    with contextlib.suppress(TypeError, ValueError):
        return sorted(ArgumentParser(exit_on_error=False).add_class_arguments(_import(class_path), fail_untyped=False))
    return []


def _type_of(class_path: str, argument: str) -> str:
    """Return the type of a class's argument as the parser writes it."""
    with contextlib.suppress(KeyError, NameError, TypeError):
        return str(get_type_hints(getattr(_import(class_path), "__init__", None))[argument])
    return ""


def _import(path: str) -> Any:
    """Import what the parser has imported before; None if there is nothing of the name."""
    module, _, name = path.rpartition(".")
    with contextlib.suppress(ImportError, ValueError):
        return getattr(importlib.import_module(module), name, None)
    return None
