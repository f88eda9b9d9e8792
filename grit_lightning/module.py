"""The LightningModule: a frozen causal language model, a PEFT adapter, and the geometry that steers the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftConfig, PeftModel, get_peft_config
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from grit_lightning.backbones.adapters import attach_adapter
from grit_lightning.backbones.fingerprint import backbone_fingerprint
from grit_lightning.backbones.inputs import accepted_arguments, require_context, require_packing
from grit_lightning.backbones.loading import load_backbone
from grit_lightning.backbones.moved_start import places, repeatable_start, start_of
from grit_lightning.backbones.origin import AdapterOrigin
from grit_lightning.backbones.shapes import empty_backbone, wants_shapes_only
from grit_lightning.batches import IGNORED, Batch, counted_rows, label_token_count, learnt_labels, model_inputs
from grit_lightning.checkpoints.adapter_state import expect_no_backbone, load_saved_state, saved_state
from grit_lightning.checkpoints.plain_values import to_plain_values
from grit_lightning.distributed.collectives import sum_over_processes
from grit_lightning.distributed.strategies import WholeAdapterStrategy, require_supported
from grit_lightning.errors import require
from grit_lightning.evaluation.choices import choice_scores
from grit_lightning.evaluation.closed_answers import ClosedAnswerMetrics
from grit_lightning.evaluation.datamodule_protocols import HasTasks, evaluation_key
from grit_lightning.evaluation.generated_answers import AnsweredRow, AnswerEvaluations
from grit_lightning.evaluation.generation import GenerationSettings
from grit_lightning.geometry.audibility import probe_token_ids
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.geometry_hooks import GeometryHooks
from grit_lightning.ignored_settings import warn_if_ignored
from grit_lightning.optimization import (
    build_optimizer,
    build_schedule,
    require_rate_is_kept,
    require_usable_callbacks,
)
from grit_lightning.preflight import require_adapter_fits, require_data_fits

_NOT_BUILT = "Model: expected one that is built, got none yet. Call configure_model(), or let the Trainer do it."


class GritLitModule(pl.LightningModule):
    """Fine-tunes a causal language model through a PEFT adapter whose gradients are preconditioned in rank space.

    A batch is a dict of `input_ids`, `attention_mask` and `labels`, each `[B, T]` int64, with −100 in `labels` where
    nothing is learnt. `position_ids` `[B, T]` that restart at 0 say that a row packs several documents, which then do not
    attend to each other. A document's first token is never learnt, whatever its label. `choice_ids` `[B, C, K]` and
    `target` `[B]` turn evaluation into classification over C closed answers; evaluation does not count rows whose `row`
    `[B]` is −1. Any other key is ignored.

    Args:
        backbone: Hub id, local folder, GGUF file, `pypi:<module>` for a model inside an installed package, or an instance.
        adapter: PEFT configuration, usually a `peft.LoraConfig` (a dict from its `to_dict()` is accepted too).
        geometry: Settings of the rank-space geometry, or None to train the plain adapter.
        optimizer: Callable from the trainable parameters to an optimizer. None for the best by our measurements
            (docs/measurements.md): `EigenbasisAdam` with a geometry, `torch.optim.AdamW` without one.
        lr_scheduler: Callable from the optimizer to a scheduler stepped once per optimizer step (or to Lightning's dict that
            describes one), `cosine` for cosine decay to zero after a linear warm-up, or None for a constant rate. Lightning's
            `ReduceLROnPlateau` is asked once an epoch, or once a step where it monitors a key of training.
        warmup_fraction: Part of all optimizer steps that the `cosine` schedule warms up for (paper: 0.05).
        dtype: Dtype of the frozen weights: `auto`, `float32`, `bfloat16` or `float16`.
        quantization: `nf4` quantises the frozen weights to 4 bit through bitsandbytes.
        gradient_checkpointing: Recompute activations in the backward pass.
        attn_implementation: Name of the attention kernel for transformers, None for its default.
        revision: Revision of a hub id.
        trim_logits: In training, compute logits only from the position before the batch's first label on. Saves time and
            memory where prompts are long and answers short; gradients agree to rounding, not to the bit.
        generation: How answers are generated in test and prediction, to be scored by the data module's `text_metrics`; None
            generates none.

    Raises:
        ValueError: If an argument is out of range; errors in backbone and adapter are raised by `configure_model`.
    """

    def __init__(
        self,
        backbone: str | PreTrainedModel,
        adapter: PeftConfig,
        geometry: GeometryConfig | None = GeometryConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | Literal["cosine"] | None = "cosine",
        warmup_fraction: float = 0.05,
        dtype: str = "auto",
        quantization: Literal["nf4"] | None = None,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        revision: str | None = None,
        trim_logits: bool = False,
        generation: GenerationSettings | None = None,
    ) -> None:
        """Remember the recipe; nothing is loaded before `configure_model`."""
        super().__init__()
        require("model", "warmup_fraction", 0.0 <= warmup_fraction <= 1.0, "a number in [0, 1]", warmup_fraction)
        self.adapter_config = get_peft_config(dict(adapter)) if isinstance(adapter, Mapping) else adapter
        self.geometry_config = GeometryConfig(**geometry) if isinstance(geometry, Mapping) else geometry
        self.optimizer_factory = optimizer
        self.scheduler_factory = lr_scheduler
        self.warmup_fraction = warmup_fraction
        self.backbone_options: dict[str, Any] = {
            "source": backbone,  # in a dict, so that an instance does not become a second submodule
            "dtype": dtype,
            "quantization": quantization,
            "gradient_checkpointing": gradient_checkpointing,
            "attn_implementation": attn_implementation,
            "revision": revision,
        }
        self.model: PeftModel | None = None
        self._has_shapes_only = False
        self.geometry: RankSpaceGeometry | None = None
        self._hooks: GeometryHooks | None = None
        self.metrics = ClosedAnswerMetrics()
        settings = GenerationSettings(**generation) if isinstance(generation, Mapping) else generation
        self.answer_evaluations = AnswerEvaluations(settings)
        self._model_arguments: frozenset[str] = frozenset()
        self.register_load_state_dict_post_hook(expect_no_backbone)  # type: ignore[no-untyped-call]
        self.trim_logits = trim_logits
        self.save_hyperparameters(self._plain_hyperparameters())

    def _plain_hyperparameters(self) -> dict[str, Any]:
        """Return constructor arguments as plain values, so that checkpoints load with weights_only=True."""
        options = dict(self.backbone_options)
        source = options.pop("source")
        return {
            "backbone": source.config._name_or_path if isinstance(source, PreTrainedModel) else str(source),
            "adapter": to_plain_values(self.adapter_config.to_dict()),
            "geometry": None if self.geometry_config is None else self.geometry_config.to_dict(),
        } | options

    # Building.

    def configure_callbacks(self) -> list[pl.Callback]:
        """Check the strategy, and from shapes alone whether backbone, adapter and data fit each other; add no callback.

        Of all hooks, Lightning calls this one first, when the data module is known and before any data is prepared.

        Raises:
            MisconfigurationException: If the strategy would split the adapter, a callback needs another model, or a search
                would set the learning rate.
            ValueError: If the backbone is no causal language model, the adapter does not fit it, or the data module's sequences
                or tokens do not.
        """
        self._forget_shapes()
        require_supported(self.trainer.strategy)
        require_usable_callbacks(self.trainer)
        require_rate_is_kept(self.trainer)
        uses = {
            "geometry": self.geometry_config is not None,
            "generation": self.answer_evaluations.settings is not None,
        }
        model = self.model or require_adapter_fits(self.backbone_options, self.adapter_config, **uses)
        require_data_fits(model, self._datamodule)
        return []

    def _forget_shapes(self) -> None:
        """Drop a model without weights, which Lightning could not move to a device."""
        if self._has_shapes_only:
            self.model = self.geometry = self._hooks = None
            self._has_shapes_only = False

    def configure_model(self) -> None:
        """Load the backbone, attach the adapter, find its layers. Does nothing when called again.

        Under `torch.device("meta")`, or Lightning's `empty_init`, the model has shapes only, until the next call elsewhere.

        Raises:
            ValueError: If the backbone cannot be found or loaded, or the adapter does not fit it.
        """
        shapes_only = wants_shapes_only()
        if not shapes_only:
            self._forget_shapes()
        if self.model is not None:
            return
        self._has_shapes_only = shapes_only
        strategy = None if self._trainer is None else self.trainer.strategy
        sharding = strategy if isinstance(strategy, WholeAdapterStrategy) and not shapes_only else None
        load = empty_backbone if shapes_only else load_backbone if sharding is None else sharding.load_backbone
        with torch.device("meta") if shapes_only else nullcontext():
            self._build(load(**self.backbone_options), sharding)
        if not shapes_only and self._trainer is not None and isinstance(self.trainer.precision_plugin, DoublePrecision):
            self.double()  # Lightning does it too, but only after a checkpoint has been loaded into float32

    def _build(self, backbone: PreTrainedModel, sharding: WholeAdapterStrategy | None) -> None:
        fingerprint = backbone_fingerprint(backbone)  # now: an adapter may start by moving the backbone's weights
        own, before = [*backbone.parameters(), *backbone.buffers()], places(backbone)
        with repeatable_start(self.adapter_config, backbone):
            model = attach_adapter(backbone, self.adapter_config)
        if sharding is not None:
            fingerprint = sharding.share_adapter(model, fingerprint)
        start = start_of(model, self.adapter_config, before)
        self.model, self._model_arguments = model, accepted_arguments(model)
        source = {name: self.hparams[name] for name in ("backbone", "dtype", "quantization", "revision")}
        origin = AdapterOrigin(fingerprint, self.adapter_config.to_dict(), start, source, tuple(own))
        try:
            self._hooks = GeometryHooks(self, model, self.geometry_config, origin=origin)
        except Exception:
            self.model = None  # nothing is built
            raise
        self.geometry = self._hooks.geometry

    def setup(self, stage: str) -> None:
        """Get the task's metrics, and the references of generated answers, from the data module.

        Raises:
            MisconfigurationException: If answers should be generated and the data module has no references for them.
            OSError: If the encoder of BERTScore cannot be read.
        """
        self.metrics.set_up(self._datamodule)
        self.answer_evaluations.set_up(stage, self._datamodule, self.trainer.strategy.root_device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Settle which layers the geometry follows; build the injected optimizer over the adapter, and its schedule.

        Raises:
            MisconfigurationException: If the optimizer or the schedule lacks something, see `optimization`.
            ValueError: If layers cannot be heard, see `geometry.audibility`.
        """
        if self.geometry is not None and self._trainer is not None:
            self._settle_layers(self.geometry)
        optimizer = build_optimizer(
            self.optimizer_factory, [p for p in self.parameters() if p.requires_grad], self.geometry
        )
        self.hooks.connect(optimizer)
        if self.scheduler_factory is None:
            return optimizer
        schedule = build_schedule(self.scheduler_factory, optimizer, self.trainer, self.warmup_fraction)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _settle_layers(self, geometry: RankSpaceGeometry) -> None:
        """Find out with a few tokens which layers can be heard; with sharded weights, the first refresh does.

        Raises:
            ValueError: If layers cannot be heard and are not to be left out, or cannot be left out under this strategy.
        """
        if isinstance(self.trainer.strategy, WholeAdapterStrategy):
            expected = "refuse with a sharded backbone, whose layers cannot be tried before training"
            choice = geometry.config.silent_layers
            require("GeometryConfig", "silent_layers", choice == "refuse", expected, choice)
            return
        ids = probe_token_ids(self.peft_model, self.device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        with self.trainer.precision_plugin.forward_context():
            self.hooks.steps.settle_layers(lambda: self(batch).loss, ids.numel())

    def on_fit_start(self) -> None:
        """Say whether a setting acts on nothing."""
        if self.scheduler_factory != "cosine":
            given, readers = {"warmup_fraction": self.warmup_fraction}, {"warmup_fraction": "lr_scheduler: cosine"}
            warn_if_ignored(GritLitModule, given, readers)

    @property
    def peft_model(self) -> PeftModel:
        """The PEFT model.

        Raises:
            RuntimeError: Before `configure_model`.
        """
        if self.model is None:
            raise RuntimeError(_NOT_BUILT)
        return self.model

    @property
    def hooks(self) -> GeometryHooks:
        """What the hooks below call, as they would in any other LightningModule.

        Raises:
            RuntimeError: Before `configure_model`.
        """
        if self._hooks is None:
            raise RuntimeError(_NOT_BUILT)
        return self._hooks

    # Steps.

    def forward(self, batch: Batch, with_loss: bool = True, trim: bool = False) -> Any:
        """Run the model.

        Args:
            batch: As the class says.
            with_loss: Compute the mean loss over label tokens.
            trim: Compute logits only from the position before the first label of the batch on.

        Returns:
            transformers' output with `logits` `[B, T', V]`, T' ≤ T the last positions of the batch, and `loss`.
        """
        require_context(self.peft_model, batch["input_ids"].shape[1], "a sequence", "data.max_length")
        if "position_ids" in batch:
            require_packing(self.peft_model, self._model_arguments, rows=len(batch["input_ids"]))
        return self.peft_model(
            **model_inputs(batch, self._model_arguments, with_loss=with_loss, trim=trim), use_cache=False
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy over the label tokens, 0 without any, and tell the geometry how to undo that mean.

        Several processes average their gradients, so that a micro-batch counts the same on any process.
        """
        self.hooks.start_micro_batch(batch["attention_mask"], label_token_count(learnt_labels(batch)))
        return self.hooks.take_loss(self(batch, trim=self.trim_logits).loss)

    def on_after_backward(self) -> None:
        """Close the micro-batch."""
        self.hooks.on_after_backward()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go where the optimizer takes its gradients, if it averages weights."""
        self.hooks.on_train_batch_start()

    def on_validation_start(self) -> None:
        """Validate the average, if the optimizer averages weights."""
        self.hooks.on_validation_start()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Precondition the accumulated gradients before they are clipped, and log the loss.

        Raises:
            FloatingPointError: If the loss or gradient of the window is not finite; the weights are those of the last step.
            ValueError: If no micro-batch of the window had a label token.
        """
        self._log_loss(self.hooks.on_before_optimizer_step(optimizer).loss_sums)

    def on_train_end(self) -> None:
        """Combine the last statistics of all processes, so that the records cover the whole run."""
        self.hooks.on_train_end()

    def _log_loss(self, sums: Tensor) -> None:
        """Log the window's mean loss over its micro-batches with labels; over all processes, at logged steps."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside the Trainer's __init__
        if every and (self.trainer.global_step + 1) % every == 0:
            sum_over_processes([sums])
        self.log("train/loss", sums[0] / sums[1].clamp(min=1), prog_bar=True, batch_size=1)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[AnsweredRow]]:
        """Log the loss, the task's classification metrics for closed answers, and scores of generated answers.

        In a mixture of tasks, each loader's results are logged under its task's name.

        Returns:
            `generations`: the rows for which answers were generated.
        """
        return self._evaluate(batch, batch_idx, self._key("val", dataloader_idx))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[AnsweredRow]]:
        """Log the same as in validation, under `test/`."""
        return self._evaluate(batch, batch_idx, self._key("test", dataloader_idx))

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor | list[AnsweredRow]:
        """Return answered rows; without `generation` the log-likelihood `[B, C]` of each closed answer, or logits."""
        key = self._key("predict", dataloader_idx)
        if key in self.answer_evaluations:
            return self._answered(batch, batch_idx, key)
        logits: Tensor = self(batch, with_loss=False).logits
        return choice_scores(self.peft_model, batch, logits) if "choice_ids" in batch else logits

    def _evaluate(self, batch: Batch, batch_idx: int, key: str) -> dict[str, list[AnsweredRow]]:
        # Rows that do not count are run too: with sharded weights all processes must take part.
        learnt = {**batch, "labels": batch["labels"].masked_fill(~counted_rows(batch)[:, None], IGNORED)}
        output = self(learnt, trim=True)
        # The epoch's loss is the mean over label tokens. A float: Lightning truncates the mean over processes of an integer.
        weight: Any = float(label_token_count(learnt_labels(learnt)))
        loss = output.loss if weight else torch.zeros_like(output.loss)  # a mean over nothing is NaN, also times zero
        options: dict[str, Any] = {"on_epoch": True, "prog_bar": True, "sync_dist": True, "add_dataloader_idx": False}
        self.log(f"{key}/loss", loss, batch_size=weight, **options)
        self.metrics.count(key, self.peft_model, batch, output.logits, self.log_dict)
        return {"generations": self._answered(batch, batch_idx, key)}

    def _answered(self, batch: Batch, batch_idx: int, key: str) -> list[AnsweredRow]:
        """Generate answers where the settings ask for them, and log their scores."""
        first, rank, ranks = batch_idx == 0, self.global_rank, self.trainer.world_size
        rows = self.answer_evaluations.answer(key, self.peft_model, batch, first=first, rank=rank, ranks=ranks)
        self.answer_evaluations.log_scores(key, self.log, "answer_evaluations")
        return rows

    def _key(self, stage: str, dataloader_idx: int) -> str:
        """Return the key that a loader's results are logged under; in a mixture each task has its own loader."""
        if not isinstance(self._datamodule, HasTasks):
            return stage
        return evaluation_key(stage, list(self._datamodule.tasks)[dataloader_idx])

    # Checkpoints: the adapter as the state, and the packer's entry.

    def state_dict(  # type: ignore[override]  # overloaded in torch
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return the adapter, see `saved_state`; a parent's state goes on collecting in `destination`."""
        state = saved_state(self, self._saved_names, prefix, keep_vars)
        if destination is None:
            return state
        destination.update(state)
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the adapter, see `load_saved_state`. A parent's `load_state_dict` works as well."""
        load_saved_state(self, self._saved_names, state_dict)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the next step depends on, besides Lightning's own content; a collective."""
        self.hooks.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits this model, and only then restore adapter and geometry.

        Raises:
            ValueError: If the checkpoint is not from this class, or has another format version, backbone or adapter.
        """
        self.hooks.on_load_checkpoint(checkpoint)

    def on_train_start(self) -> None:
        """Say which settings of the geometry act on nothing; on resume, restore random numbers and an unfinished window."""
        self.hooks.on_train_start()

    @property
    def _saved_names(self) -> frozenset[str]:
        return frozenset() if self._hooks is None else self._hooks.steps.saved_names

    @property
    def _datamodule(self) -> object:
        return self.trainer.datamodule  # type: ignore[attr-defined]  # set outside the Trainer's __init__
