r"""Prompt templates: how the columns of a row become a prompt and an answer, as data.

A template is a small YAML file. `prompt` and `answer` are Python format strings over the columns of the task;
`{answer}` in `answer` is what the task's answer function returned. Literal braces are doubled, as in `str.format`.

    prompt: |-
      {passage}
      Question: {question}?
      Answer:
    answer: " {answer}"
    truncate: passage            # the column that is cut when a row is too long; leave out to cut nothing
    prompt_without:              # optional: the prompt to use where a column is empty
      passage: "Question: {question}?\nAnswer:"
    system: "You are terse."     # optional: system message, only read with a chat template
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter

import yaml  # type: ignore[import-untyped]

from grit_lightning.errors import InvalidValueError, MissingFileError

TEMPLATES = Path(__file__).parents[1] / "templates"


def shipped_templates() -> list[str]:
    """Return the names of all shipped templates, sorted."""
    return sorted(path.stem for path in TEMPLATES.glob("*.yaml"))


@dataclass(frozen=True)
class PromptTemplate:
    """One way of writing a row down for a language model.

    Attributes:
        prompt: Format string over the task's columns: what the model is given.
        answer: Format string over `answer`: what the model learns to say. Begins with the space that separates it.
        truncate: Column whose end is cut when a row does not fit into the maximal length; None cuts nothing.
        system: System message, used with a chat template only.
        prompt_without: For a column that may be empty, the prompt to use where it is.
        name: Where the template came from, for messages.
    """

    prompt: str
    answer: str = " {answer}"
    truncate: str | None = None
    system: str | None = None
    prompt_without: Mapping[str, str] = field(default_factory=dict)
    name: str = "in code"

    @classmethod
    def load(cls, source: str) -> PromptTemplate:
        """Read a shipped template by its name, or a template file by its path.

        Args:
            source: Name of a file in `datamodules/templates` without its ending, or the path of a YAML file.

        Raises:
            FileNotFoundError: There is neither; lists the shipped names.
            ValueError: The file is not a mapping of this class's attributes to text.
        """
        path = TEMPLATES / f"{source}.yaml"
        if not path.is_file():
            path = Path(source).expanduser()
        if not path.is_file():
            shipped = ", ".join(shipped_templates())
            raise MissingFileError(f"template: expected the path of a YAML file, or one of {shipped}, got {source!r}.")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        known = set(cls.__dataclass_fields__) - {"name"}
        if not isinstance(content, dict) or "prompt" not in content or not set(content) <= known:
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise InvalidValueError(
                f"{path}: expected a mapping with `prompt` and any of {sorted(known)}, got {found}."
            )
        return cls(**content, name=str(path))

    @property
    def columns(self) -> set[str]:
        """The columns that the prompt is made of."""
        used = {name for text in (self.prompt, *self.prompt_without.values()) for name in _placeholders(text)}
        return used | {*self.prompt_without, *([self.truncate] if self.truncate else [])}

    def check(self, columns: Collection[str]) -> None:
        """Check that the template only names what a row has.

        Args:
            columns: Columns of the task.

        Raises:
            ValueError: A placeholder, `truncate` or `prompt_without` names an unknown column.
        """
        if unknown := sorted(self.columns - set(columns)):
            raise InvalidValueError(
                f"Template {self.name}: expected columns of the task, {sorted(columns)}, got {unknown}. Change the template."
            )
        if _placeholders(self.answer) != {"answer"}:
            raise InvalidValueError(
                f"Template {self.name}: expected {{answer}} and nothing else in braces in `answer`, got {self.answer!r}."
            )

    def render(self, row: Mapping[str, str]) -> str:
        r"""Write the prompt of a row.

        Example:
            >>> PromptTemplate("Question: {question}?\nAnswer:").render({"question": "is ice cold"})
            'Question: is ice cold?\nAnswer:'
        """
        for column, prompt in self.prompt_without.items():
            if not row[column].strip():
                return prompt.format_map(row)
        return self.prompt.format_map(row)


def _placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}
