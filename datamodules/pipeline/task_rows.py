"""Rows of a task to token ids: what a task's `answer` sees of a row, and what becomes of rows that it cannot answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grit_lightning.datamodules.pipeline.encoding import PromptEncoder
from grit_lightning.datamodules.pipeline.splits import without_columns
from grit_lightning.datamodules.pipeline.text import UnusableColumnError, as_text
from grit_lightning.datamodules.pipeline.token_cache import tokenizer_hash
from grit_lightning.datamodules.pipeline.tokenized import EncodedRow, RowEncoder
from grit_lightning.errors import InvalidValueError

Question = tuple[dict[str, str], str]
"""The texts of the prompt's columns, and the answer."""


class MissingColumnError(KeyError):
    """A row has no such column."""


class TaskRow(Mapping[str, Any]):
    """The values of a row under the task's column names, each checked when it is read.

    Args:
        values: Value of each column that the source has.
        optional: Columns that may be empty.
    """

    def __init__(self, values: Mapping[str, Any], optional: Collection[str] = ()) -> None:
        """Keep the values."""
        self._values = values
        self._optional = optional

    def __getitem__(self, column: str) -> Any:
        """Return the value of a column.

        Raises:
            MissingColumnError: The source has no such column.
            UnusableColumnError: It is empty, and not optional.
        """
        if column not in self._values:
            raise MissingColumnError(column)
        value = self._values[column]
        empty = value is None or (isinstance(value, str) and not value.strip())
        if empty and column not in self._optional:
            raise UnusableColumnError(column, "expected a value, got an empty field")
        return value

    def __iter__(self) -> Iterator[str]:
        """Iterate over the columns."""
        return iter(self._values)

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(self._values)


@dataclass(frozen=True, kw_only=True)
class TaskRowEncoder(RowEncoder):
    """Asks the task for the answers of its rows and encodes both.

    Attributes:
        encoder: Rows to token ids.
        answer: Answer of a row; raises ValueError for a row without a usable one.
        choices: Closed answers in class order; empty for free answers.
    """

    encoder: PromptEncoder
    answer: Callable[[Mapping[str, Any]], str]
    choices: Sequence[str] = ()

    def settings(self) -> dict[str, Any]:
        """Return what else the result depends on."""
        encoder = self.encoder
        template = {name: getattr(encoder.template, name) for name in encoder.template.__dataclass_fields__}
        del template["name"]  # where it came from does not matter
        return {
            "choices": list(self.choices),
            "template": template,
            "tokenizer": tokenizer_hash(encoder.tokenizer),
            "use_chat_template": encoder.use_chat_template,
            "append_eos": encoder.append_eos,
            "allow_control_tokens": encoder.allow_control_tokens,
            "max_length": encoder.max_length,
        }

    def encode_rows(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[EncodedRow]:
        """Encode rows, each with its answer."""
        read = [self._read(row, number) for row, number in zip(rows, numbers, strict=True)]
        usable = [found for found in read if not isinstance(found, EncodedRow)]
        ready = iter(self.encoder.encode([prompt for prompt, _ in usable], [answer for _, answer in usable]))
        return [
            found
            if isinstance(found, EncodedRow)
            else next(ready)._replace(target=self._target(found[1]), reference=found[1])
            for found in read
        ]

    def _target(self, answer: str) -> int:
        return self.choices.index(answer) if answer in self.choices else -1

    def _read(self, row: Mapping[str, Any], number: int) -> Question | EncodedRow:
        """Return the question of a row and its answer; or, to skip the row, an empty one that says why."""
        template = self.encoder.template
        checked = TaskRow(row, template.prompt_without)
        try:
            prompt = {column: as_text(checked[column], column) for column in sorted(template.columns)}
            answer = self.answer(checked)
            if not isinstance(answer, str):
                raise InvalidValueError(f"answer: expected text from the task's `answer`, got {answer!r}")
            if self.choices and answer not in self.choices:
                raise InvalidValueError(f"answer: expected one of {list(self.choices)}, got {answer!r}")
        except MissingColumnError as error:
            missing = [self.name(error.args[0])]
            raise InvalidValueError(without_columns(self.where, missing, self.found or list(row))) from error
        except UnusableColumnError as error:
            name = self.name(error.column)
            return self.skip(number, f"column {name!r}: {error.problem}", f"column {name!r} empty or no text", error)
        except ValueError as error:
            return self.skip(number, str(error), "no usable answer", error)
        except KeyError as error:  # of a dictionary of labels
            return self.skip(
                number, f"answer: expected a label that the task knows, got {error}", "no usable answer", error
            )
        return prompt, answer
