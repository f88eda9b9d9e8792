"""The LightningModule: a frozen causal language model, a PEFT adapter, and the geometry that steers the adapter."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftConfig, PeftModel, get_peft_config
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torchmetrics import MetricCollection
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from grit_lightning.backbones.fingerprint import backbone_fingerprint
from grit_lightning.backbones.loading import attach_adapter, load_backbone
from grit_lightning.batches import Batch, label_token_count, learnt_labels, packed_positions, trimmed_labels
from grit_lightning.checkpoints.adapter_state import AdapterState, plain
from grit_lightning.distributed.collectives import process_count, sum_over_processes
from grit_lightning.distributed.strategies import WholeAdapterStrategy, require_supported
from grit_lightning.evaluation.choices import IGNORED, choice_scores, position_ids
from grit_lightning.evaluation.generated_answers import GenerationSteps, Record
from grit_lightning.evaluation.generation import GenerationSettings
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.optimizers import EigenbasisAdam, GeometryAdam


class GritLitModule(AdapterState, GenerationSteps):
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
        optimizer: Callable from the trainable parameters to an optimizer. None is what was measured best
            (docs/measurements.md): `EigenbasisAdam` with a geometry, `torch.optim.AdamW` without one.
        lr_scheduler: Callable from the optimizer to a scheduler stepped once per optimizer step, `cosine` for cosine decay
            to zero after a linear warm-up, or None for a constant rate.
        warmup_fraction: Part of all optimizer steps that the `cosine` schedule warms up for (paper: 0.05).
        dtype: `auto`, `float32`, `bfloat16` or `float16`, of the frozen weights.
        quantization: `nf4` quantises the frozen weights to 4 bit through bitsandbytes.
        gradient_checkpointing: Recompute activations in the backward pass.
        attn_implementation: Attention kernel name passed to transformers, None for its default.
        revision: Revision of a hub id.
        trim_logits: In training, compute logits only from the position before the batch's first label on. Saves time and
            memory where prompts are long and answers short; gradients agree to rounding, not to the bit.
        generation: How answers are generated in test and prediction, to be scored by the data module's `text_metrics`; None
            generates none.

    Raises:
        ValueError: If an argument is out of range; errors of the backbone and adapter come from `configure_model`.
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
        if not 0.0 <= warmup_fraction <= 1.0:
            raise ValueError(f"warmup_fraction must lie in [0, 1], got {warmup_fraction}.")
        self.adapter_config = get_peft_config(dict(adapter)) if isinstance(adapter, Mapping) else adapter
        self.geometry_config = GeometryConfig(**geometry) if isinstance(geometry, Mapping) else geometry
        self.optimizer_factory = optimizer
        self.scheduler_factory = lr_scheduler
        self.warmup_fraction = warmup_fraction
        self.loading: dict[str, Any] = {  # a dict, so that an instance does not become a submodule a second time
            "source": backbone,
            "dtype": dtype,
            "quantization": quantization,
            "gradient_checkpointing": gradient_checkpointing,
            "attn_implementation": attn_implementation,
            "revision": revision,
        }
        self.model: PeftModel | None = None
        self.geometry: RankSpaceGeometry | None = None
        self.metrics = torch.nn.ModuleDict()
        self.generation = GenerationSettings(**generation) if isinstance(generation, Mapping) else generation
        self.generators = torch.nn.ModuleDict()
        self._window_micro_batches = 0
        self._window_losses: list[Tensor] = []
        self._model_arguments: frozenset[str] = frozenset()
        self._fingerprint: dict[str, Any] = {}
        self._resumed: dict[str, Any] | None = None
        self.trim_logits = trim_logits
        self.save_hyperparameters(self._plain_hyperparameters())

    def _plain_hyperparameters(self) -> dict[str, Any]:
        """Constructor arguments as plain values, so that checkpoints load with weights_only=True."""
        options = dict(self.loading)
        source = options.pop("source")
        return {
            "backbone": source.config._name_or_path if isinstance(source, PreTrainedModel) else str(source),
            "adapter": plain(self.adapter_config.to_dict()),
            "geometry": None if self.geometry_config is None else self.geometry_config.to_dict(),
        } | options

    # Building.

    def configure_model(self) -> None:
        """Load the backbone, attach the adapter, find its layers. Does nothing when called again.

        Raises:
            ValueError: If the backbone cannot be found or loaded, or the adapter does not fit it.
        """
        if self.model is not None:
            return
        strategy = None if self._trainer is None else self.trainer.strategy
        sharding = strategy if isinstance(strategy, WholeAdapterStrategy) else None
        backbone = (load_backbone if sharding is None else sharding.load_backbone)(**self.loading)
        fingerprint = backbone_fingerprint(backbone)  # now: an adapter may start by moving the backbone's weights
        model = attach_adapter(backbone, self.adapter_config)
        if sharding is not None:
            fingerprint = sharding.share_adapter(model, fingerprint)
        geometry = None if self.geometry_config is None else RankSpaceGeometry(model, self.geometry_config)
        self._model_arguments = frozenset(inspect.signature(model.get_base_model().forward).parameters)
        self.model, self.geometry, self._fingerprint = model, geometry, fingerprint

    def setup(self, stage: str) -> None:
        """Check the strategy; ask the data module for its task's metrics, and for what generated answers are scored by.

        Raises:
            MisconfigurationException: If the strategy would split the adapter.
        """
        require_supported(self.trainer.strategy)
        super().setup(stage)
        source = getattr(getattr(self.trainer, "datamodule", None), "metrics", None)
        for prefix in ("val", "test"):
            given = source() if source is not None else None
            tasks = given if isinstance(given, dict) else {"": given}  # a mixture has one collection a task
            for name, collection in tasks.items():
                key = f"{prefix}/{name}".rstrip("/")
                if collection is not None and key not in self.metrics:
                    self.metrics[key] = collection.clone(prefix=f"{key}/")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the injected optimizer over the adapter, and its schedule."""
        factory = self.optimizer_factory or (AdamW if self.geometry is None else EigenbasisAdam)
        optimizer = factory([p for p in self.parameters() if p.requires_grad])
        if isinstance(optimizer, GeometryAdam):
            if self.geometry is None:
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} needs the rank-space geometry. Set model.geometry to a GeometryConfig, or "
                    "use torch.optim.AdamW."
                )
            optimizer.bind(self.geometry)
        if self.scheduler_factory is None:
            return optimizer
        if self.scheduler_factory == "cosine":
            total = int(self.trainer.estimated_stepping_batches)
            scheduler = get_cosine_schedule_with_warmup(optimizer, round(self.warmup_fraction * total), total)
        else:
            scheduler = self.scheduler_factory(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Check that Trainer and data can serve the geometry, and move its state to the adapter's device.

        Raises:
            MisconfigurationException: If the optimizer un-scales AMP gradients itself (fused), so that the preconditioner
                would see scaled ones.
            ValueError: If the data module's sequences are longer than the model's context.
        """
        if self._scaler is not None:
            for optimizer in self.trainer.optimizers or []:
                if getattr(optimizer, "_step_supports_amp_scaling", False):
                    raise MisconfigurationException(
                        f"{type(optimizer).__name__} with fused=True un-scales fp16 gradients inside its own step, after "
                        "preconditioning. Set fused=False, or train with precision bf16-mixed."
                    )
        self._check_context(getattr(getattr(self.trainer, "datamodule", None), "max_length", 0) or 0)
        if self.geometry is not None:
            self.geometry.to(self.device)

    @property
    def peft_model(self) -> PeftModel:
        """The PEFT model.

        Raises:
            RuntimeError: Before `configure_model`.
        """
        if self.model is None:
            raise RuntimeError("The model is not built yet: call configure_model(), or let the Trainer do it.")
        return self.model

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
        self._check_context(batch["input_ids"].shape[1])
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if self._accepts("position_ids"):
            inputs["position_ids"] = position_ids(batch["attention_mask"])
        if "position_ids" in batch:
            self._check_packing(len(batch["input_ids"]))
            # transformers keeps documents apart where positions do not go up by one, but only without a mask: padding gets
            # a position that nothing can follow.
            inputs["position_ids"] = packed_positions(batch)
            del inputs["attention_mask"]
        labels = learnt_labels(batch)
        if trim and self._accepts("logits_to_keep"):
            labels = trimmed_labels(labels)
            inputs["logits_to_keep"] = labels.shape[1]
        if with_loss:
            inputs["labels"] = labels
        return self.peft_model(**inputs, use_cache=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy over the label tokens, 0 where there are none; tells the geometry how to undo that mean.

        Several processes average their gradients, so that a micro-batch counts the same on whichever process it is.
        """
        label_tokens = label_token_count(learnt_labels(batch))
        if self.geometry is not None:
            loss_scale = torch.full((), 1.0 / self.trainer.accumulate_grad_batches, device=self.device)
            if self._scaler is not None:
                loss_scale = self._scaler.scale(loss_scale)
            self.geometry.start_micro_batch(
                batch["attention_mask"],
                label_tokens.clamp(min=1) / loss_scale,
                loss_scale if self.geometry.config.regularised else None,
            )
        loss: Tensor = self(batch, trim=self.trim_logits).loss
        learns = label_tokens > 0
        loss = torch.where(learns, loss, torch.zeros_like(loss))  # the mean of nothing is NaN, its gradient 0
        self._window_losses.append(torch.stack([loss.detach().float(), learns.float()]))
        return loss

    def on_after_backward(self) -> None:
        """Close the micro-batch."""
        self._window_micro_batches += 1
        if self.geometry is not None:
            self.geometry.finish_micro_batch()

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Precondition the accumulated gradients, before clipping. By now all processes have the same ones.

        Raises:
            FloatingPointError: If the loss or gradient of the window was not finite; weights are still those of the last step.
            ValueError: If no micro-batch of the window had a label token.
        """
        losses, self._window_losses = self._window_losses, []
        micro_batches, self._window_micro_batches = self._window_micro_batches, 0
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if micro_batches < self.trainer.accumulate_grad_batches:  # an epoch's last window; Lightning divided by all
            torch._foreach_mul_(gradients, self.trainer.accumulate_grad_batches / micro_batches)
        finite = self._check_window(torch.stack(losses), gradients)
        self._log_loss(torch.stack(losses).sum(0))
        if self.geometry is None:
            return
        if not finite:
            self.geometry.discard_window()  # the scaler will skip this step
            return
        self.geometry.step(precondition=not isinstance(_unwrapped(optimizer), GeometryAdam))

    def on_train_end(self) -> None:
        """Take the last statistics of all processes together, so that the records are those of the whole run."""
        if self.geometry is not None:
            self.geometry.reduce()

    def _check_window(self, losses: Tensor, gradients: list[Tensor]) -> bool:
        """Return whether the gradients are finite; raise as `on_before_optimizer_step` says, alike on every process.

        Losses `[M, 2]` are this process's own: of each micro-batch, and whether it had labels. Gradients are everybody's.
        """
        norm = torch.stack(torch._foreach_norm(gradients)).float().norm()
        (loss, learnt), length = losses.sum(0).tolist(), float(norm)
        step, others = self.trainer.global_step, " of all processes" if process_count() > 1 else ""
        if not math.isfinite(loss) or not (math.isfinite(length) or self._scaler is not None):
            what = "loss" if not math.isfinite(loss) else f"gradient{others} is not finite, the loss"
            raise FloatingPointError(
                f"The training {what} is {losses[:, 0].tolist()} at optimizer step {step}. Nothing of this step was applied. "
                "Lower the learning rate, set trainer.gradient_clip_val, or use bfloat16 instead of float16."
            )
        if learnt == 0 and length == 0.0:
            raise ValueError(
                f"None of the {len(losses)} micro-batches of optimizer step {step} has a label token, so there is nothing to "
                "learn. Look at the labels (−100 where nothing is learnt), or raise data.max_length if answers were cut off."
            )
        return math.isfinite(length)

    def _log_loss(self, sums: Tensor) -> None:
        """Log the window's mean loss over its micro-batches with labels, of all processes at the steps that loggers see."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside the Trainer's __init__
        if every and (self.trainer.global_step + 1) % every == 0:
            sum_over_processes([sums])
        self.log("train/loss", sums[0] / sums[1].clamp(min=1), prog_bar=True, batch_size=1)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[Record]]:
        """Loss, for closed answers the task's classification metrics, and generated answers if `generation` says so.

        Of a mixture of tasks those of the loader's task.

        Returns:
            `generations`: the records of the answers that were generated.
        """
        return self._evaluate(batch, batch_idx, self._prefix("val", dataloader_idx))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[Record]]:
        """Same as validation, under `test/`."""
        return self._evaluate(batch, batch_idx, self._prefix("test", dataloader_idx))

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor | list[Record]:
        """Records of generated answers; without `generation` the log-likelihood `[B, C]` of each closed answer, or logits."""
        prefix = self._prefix("predict", dataloader_idx)
        if prefix in self.generators:
            return self.generate_records(self.peft_model, batch, batch_idx, prefix)
        logits: Tensor = self(batch, with_loss=False).logits
        return choice_scores(self.peft_model, batch, logits) if "choice_ids" in batch else logits

    def _prefix(self, stage: str, dataloader_idx: int) -> str:
        """The stage, and behind it the task's name where the data are a mixture of tasks, each with its loader."""
        tasks = list(getattr(getattr(self.trainer, "datamodule", None), "tasks", ()))
        return f"{stage}/{tasks[dataloader_idx]}" if tasks else stage

    def _evaluate(self, batch: Batch, batch_idx: int, prefix: str) -> dict[str, list[Record]]:
        counted = batch["row"] >= 0 if "row" in batch else torch.ones_like(batch["labels"][:, 0], dtype=torch.bool)
        learnt = {**batch, "labels": batch["labels"].masked_fill(~counted[:, None], IGNORED)}
        output = self(learnt, trim=True)  # rows that do not count go along: with sharded weights all processes must run
        # The epoch's loss is the mean over label tokens. A float: Lightning truncates the mean over processes of an integer.
        weight: Any = float(label_token_count(learnt_labels(learnt)))
        loss = output.loss if weight else torch.zeros_like(output.loss)  # a mean over nothing is NaN, also times zero
        self.log(
            f"{prefix}/loss",
            loss,
            batch_size=weight,
            on_epoch=True,
            prog_bar=True,
            sync_dist=True,
            add_dataloader_idx=False,
        )
        if "choice_ids" in batch and prefix in self.metrics:
            metrics = self.metrics[prefix]
            assert isinstance(metrics, MetricCollection)
            predicted = choice_scores(self.peft_model, batch, output.logits).argmax(-1)
            if counted.any():
                metrics.update(predicted[counted], batch["target"][counted])
            count = len(batch["target"])
            self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=count, add_dataloader_idx=False)
        return {"generations": self.generate_records(self.peft_model, batch, batch_idx, prefix)}

    def _accepts(self, argument: str) -> bool:
        return argument in self._model_arguments

    def _check_context(self, length: int) -> None:
        context = getattr(self.peft_model.config, "max_position_embeddings", None)
        if context is not None and length > context:
            raise ValueError(
                f"A sequence of {length} tokens does not fit the model's context of {context}. "
                f"Set data.max_length to at most {context}."
            )

    def _check_packing(self, rows: int) -> None:
        if not self._accepts("position_ids"):
            raise ValueError(
                f"The batch has position_ids, but {type(self.peft_model.get_base_model()).__name__} takes none, so that packed "
                "documents would attend to each other. Put one document in a row, without position_ids."
            )
        kernel = getattr(self.peft_model.config, "_attn_implementation", None) or ""
        if "flash" in kernel and rows > 1:
            raise ValueError(
                f"{kernel} keeps packed documents apart only in batches of one row, this one has {rows}. Set the batch size "
                "to 1 and accumulate, or set attn_implementation to sdpa."
            )

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)


def _unwrapped(optimizer: Any) -> Any:
    """Return the torch optimizer inside Lightning's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
