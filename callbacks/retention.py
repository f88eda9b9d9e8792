"""Keeps what the backbone knew while an adapter is trained, by the curvature of a little general text beside the task's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from grit_lightning import functional as F
from grit_lightning.backbones.inputs import require_context
from grit_lightning.callbacks.base import GeometryCallback, ScheduledCallback, one_of
from grit_lightning.callbacks.event_log import EventLog
from grit_lightning.callbacks.last_edit import put_before_probes, save_around
from grit_lightning.callbacks.lookup import peft_model_of, tokenizer_for
from grit_lightning.callbacks.retention_settings import (
    OWNER,
    orders_directions,
    require_texts,
    warn_of_shared_documents,
)
from grit_lightning.callbacks.validation_loss import (
    Strength,
    require_validation,
    strongest_within,
    validation_loss,
)
from grit_lightning.distributed.strategies import WholeAdapterStrategy
from grit_lightning.errors import InvalidValueError, require
from grit_lightning.forgetting.dealt_blocks import DealtBlocks
from grit_lightning.forgetting.general_statistics import GeneralStatistics
from grit_lightning.forgetting.text import TextData
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.geometry.retention import (
    TOKENS_PER_RANK,
    RetentionEdit,
    judge_by_retention,
    judge_by_task,
    retention_edit,
    tried,
)
from grit_lightning.ignored_settings import warn_if_ignored
from grit_lightning.runs.writing import is_dev_run

MODES, METRICS = ("at_end", "periodic", "penalty"), ("task", "retention")


class Retention(GeometryCallback):
    """Keeps what the backbone knew, by two Fishers in rank space: the task's, which the geometry has, and general text's.

    General text goes through the model every `every_n_steps` optimizer steps and enters a second estimate of every layer; it
    costs one forward and one backward pass of `batch_size` blocks of `block_size` tokens on every process each time,
    without recomputed activations. Nothing of it enters the task's statistics, gradients or random numbers. Both estimates
    follow what `Reprojection` and `RankAdaptation` do. What is done, per layer, with X of `functional.retention_map`:

    - `at_end`: B ← B X once, when training ends, before `ForgettingProbe` measures and the last checkpoint is written. The
      adapter as it was stays: in `unedited.ckpt` beside the checkpoints, and in `unedited`. Where no `AdapterCheckpoint`
      writes, the edited one goes to `retained.ckpt` there.
    - `periodic`: B ← B X every `edit_every_n_steps` steps, between two optimizer steps, whose moments are carried along. Each
      edit pulls towards the backbone anew, like a decay: the more edits, the smaller μ.
    - `penalty`: the gradient of μ · ½ Σ tr(Σ_g Σ_a) of general text, exact in A and B (`functional.exposure_gradients`), joins
      the task's before it is preconditioned and clipped, in the steps in which general text is measured, and
      `every_n_steps` times as strong, so that μ means the same at every interval. The weights are not edited.

    Args:
        texts: General text, of the kind that the backbone was pretrained on; other documents than a probe's.
        mode: What is done, as above.
        mu: μ ≥ 0, what a nat of general text is worth in nats of the task, per token of each.
        task_tolerance: For `at_end`, choose the largest μ at which the loss on the validation rows rises by at most so many
            nats per token, by measuring it at up to eight strengths; None takes `mu`.
        weights: Share of each text among the blocks, by its name; 1 for those that are not named.
        every_n_steps: Optimizer steps between two micro-batches of general text; None, for `at_end`, takes all blocks once, at
            the end.
        edit_every_n_steps: Optimizer steps between two edits of `periodic`.
        start_step: First optimizer step at which general text is measured or the adapter edited.
        stop_step: Last such step; None for no end.
        metric: What `Reprojection` (but for `one_sided`) and `RankAdaptation` (but for `energy`) put directions in order by:
            `task`, what each is worth to the task; `retention`, what it would be worth after an edit at μ, so that those
            that general text pays for go first.
        block_size: Tokens of a block of text; at most the model's context.
        max_blocks: Blocks of each text, from its start; None for all. They are dealt out in turn, again and again.
        batch_size: Blocks in a micro-batch of a process.
        ema_beta: Decay of the second estimate per micro-batch of general text.
        damping: As in `functional.retention_map`.
        tokenizer: Hub id or folder of the tokenizer; None for the data module's, or else the backbone's.

    Attributes:
        unedited: B of every layer by name, as it was before the edit of `at_end`, on the CPU.

    Raises:
        ValueError: If there is no text, a setting is out of range, or two texts have the same name.
    """

    def __init__(
        self,
        texts: list[TextData] | None = None,
        mode: str = "at_end",
        mu: float = 0.1,
        task_tolerance: float | None = None,
        weights: dict[str, float] | None = None,
        every_n_steps: int | None = 4,
        edit_every_n_steps: int = 50,
        start_step: int = 0,
        stop_step: int | None = None,
        metric: str = "task",
        block_size: int = 256,
        max_blocks: int | None = 64,
        batch_size: int = 4,
        ema_beta: float = 0.95,
        damping: float = 1e-4,
        tokenizer: str | None = None,
    ) -> None:
        """Check and remember the settings; text is read in `setup`."""
        super().__init__(every_n_steps, start_step, stop_step, EventLog("retention.jsonl"))
        require(OWNER, "mode", mode in MODES, one_of(MODES), mode)
        require(OWNER, "metric", metric in METRICS, one_of(METRICS), metric)
        require(OWNER, "mu", 0.0 <= mu < float("inf"), "a number ≥ 0", mu)
        measured = task_tolerance is None or (mode == "at_end" and 0.0 <= task_tolerance < float("inf"))
        require(OWNER, "task_tolerance", measured, "null, or in mode at_end a number ≥ 0 (nats)", task_tolerance)
        require(OWNER, "damping", 0.0 <= damping < float("inf"), "a number ≥ 0", damping)
        require(OWNER, "ema_beta", 0.0 <= ema_beta < 1.0, "a number in [0, 1)", ema_beta)
        once = every_n_steps is not None or (mode == "at_end" and metric == "task")
        require(
            OWNER,
            "every_n_steps",
            once,
            f"an integer ≥ 1 (optimizer steps) in mode {mode}, metric {metric}",
            every_n_steps,
        )
        for name, value, least in (
            ("edit_every_n_steps", edit_every_n_steps, 1),
            ("block_size", block_size, 2),
            ("max_blocks", max_blocks, 1),
            ("batch_size", batch_size, 1),
        ):
            require(OWNER, name, value is None or value >= least, f"an integer ≥ {least}", value)
        self.texts = [TextData(**text) if isinstance(text, Mapping) else text for text in texts or []]
        self.weights = dict(weights or {})
        require_texts(self.texts, self.weights)
        self.mode, self.mu, self.damping, self.metric = mode, mu, damping, metric
        self.task_tolerance, self.edit_every_n_steps = task_tolerance, edit_every_n_steps
        self.block_size, self.max_blocks, self.batch_size = block_size, max_blocks, batch_size
        self.ema_beta, self.tokenizer = ema_beta, tokenizer
        self.changes_coordinates = mode != "penalty"
        self.unedited: dict[str, Tensor] = {}
        self._text: DealtBlocks | None = None
        self._general: GeneralStatistics | None = None
        self._loaded: dict[str, Any] | None = None
        self._edits = 0
        self._last_event: dict[str, Any] = {}
        self._penalty: Tensor | None = None
        self._tries_everything = False

    @property
    def estimate(self) -> RankSpaceGeometry:
        """The estimate of general text.

        Raises:
            RuntimeError: Before the fit has begun.
        """
        return self._measuring.estimate

    @property
    def _measuring(self) -> GeneralStatistics:
        if self._general is None:
            raise RuntimeError(
                "Retention: expected a fit that has begun, got none. Hand the callback to a Trainer and fit."
            )
        return self._general

    # When.

    def should_act(self, step: int) -> bool:
        """Say whether general text is due after a step, or an edit of `periodic`."""
        return self.measures(step) or self.edits(step)

    def measures(self, step: int) -> bool:
        """Say whether general text is due after optimizer step `step`; `fast_dev_run` tries every one."""
        return super().should_act(step) or (self._tries_everything and self.every_n_steps is not None)

    def edits(self, step: int) -> bool:
        """Say whether an edit is due after optimizer step `step`, if it is not the one at the end."""
        within = self.start_step <= step <= (step if self.stop_step is None else self.stop_step)
        due = within and step % self.edit_every_n_steps == 0
        return self.mode == "periodic" and (due or self._tries_everything)

    # Trainer hooks.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the text, on every process, before anything is trained.

        Raises:
            FileNotFoundError: If a text is missing.
            ValueError: If a text cannot be used as it is.
            ConnectionError: If the hub cannot be reached.
            MisconfigurationException: If no tokenizer can be found.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._tries_everything = is_dev_run(trainer)
        tokenizer = tokenizer_for(OWNER, self.tokenizer, trainer, pl_module)
        blocks = [text.read(tokenizer, self.block_size, self.max_blocks) for text in self.texts]
        self._text = DealtBlocks(blocks, self.weights)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the second estimate, or go on with the checkpoint's.

        Raises:
            MisconfigurationException: If there is no geometry or PEFT model, weights are averaged while they are edited, or
                there is nothing to measure a tolerance on.
            ValueError: If blocks are longer than the model's context, their tokens are not the model's or too few for the rank,
                the checkpoint's estimate is of other text, or the optimizer's state cannot follow an edit.
        """
        super().on_fit_start(trainer, pl_module)
        assert self._text is not None
        geometry, model = self._geometry(pl_module), peft_model_of(OWNER, pl_module)
        require_context(model, self.block_size, "a block of text", "Retention.block_size")
        self._stop_listening(pl_module)  # to an earlier fit, if that has failed
        self._text.go_to(0)
        self._text.require_known(model.get_input_embeddings().num_embeddings, "Retention.tokenizer")
        self._text.require_tokens(TOKENS_PER_RANK * max(group.r for group in geometry.groups), "Retention.texts")
        estimate = geometry.beside(model, GeometryConfig(ema_beta=self.ema_beta))
        self._general = GeneralStatistics(
            self._text,
            estimate,
            self.batch_size,
            trainer.global_rank,
            trainer.world_size,
            with_cross_moments=self.mode == "penalty",
        )
        self._edits, self._last_event, self._penalty, self.unedited = 0, {}, None, {}
        if self.task_tolerance is not None:
            require_validation("Retention.task_tolerance", trainer, pl_module)
        if self._loaded is not None and not self._tries_everything:
            self._restore(self._loaded)
        self._loaded = None
        if self.metric == "retention":
            judge_by_retention(geometry, estimate, self.mu, self.damping)
        if self.mode == "at_end":
            put_before_probes(trainer, self)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop listening; a checkpoint that is saved after the fit still holds the estimate."""
        self._stop_listening(pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """In `penalty`, take general text at the weights of the step under way and add the gradient to the task's."""
        if self.mode != "penalty" or self.every_n_steps is None or not self.measures(trainer.global_step + 1):
            return
        self._measure(trainer)
        assert self._measuring.cross is not None
        self._measuring.cross.add_penalty(self.mu * self.every_n_steps)
        groups = self.estimate.groups
        values = torch.stack([F.quadratic_penalty(group.g_cov, group.a_cov).sum() for group in groups])
        self._penalty = self.mu * values.sum()
        if not trainer.barebones:
            pl_module.log("retention/penalty", self._penalty, on_step=True, on_epoch=False, batch_size=1)

    def act(self, trainer: pl.Trainer, geometry: RankSpaceGeometry) -> None:
        """Take general text, edit the adapter, or both; a penalty has done so before the step."""
        if self.mode == "penalty":
            return
        if self.measures(trainer.global_step):
            self._measure(trainer)
        if self.edits(trainer.global_step):
            planned = self._planned(geometry, self.mu)
            if self.mu == 0 or planned.layers == 0:
                return
            self._edit(trainer, geometry, planned)
            if not trainer.barebones:
                trainer.lightning_module.log_dict(self._predicted_costs(), on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Edit once, in `at_end`, before the probe measures and the last checkpoint is written."""
        if self.mode != "at_end":
            return
        geometry = self._geometry(pl_module)
        if self.every_n_steps is None:
            self._measure(trainer, 1 if self._tries_everything else self._measuring.micro_batches)
        found = None if self.task_tolerance is None else self._strongest(trainer, geometry, self.task_tolerance)
        planned = self._planned(geometry, self.mu if found is None else found.mu)
        if planned.mu > 0 and planned.layers > 0:
            self._edit_at_end(trainer, geometry, planned, found)

    # General text.

    def _stop_listening(self, pl_module: pl.LightningModule) -> None:
        geometry = getattr(pl_module, "geometry", None)
        if self._general is not None and isinstance(geometry, RankSpaceGeometry):
            geometry.release(self._general.estimate)
            judge_by_task(geometry)
            self._general.detach()

    def _measure(self, trainer: pl.Trainer, micro_batches: int = 1) -> None:
        """Take general text through the model as the strategy has wrapped it, except for DDP, whose reducer must not notice."""
        module = trainer.lightning_module
        sharded: Any = trainer.strategy.model if isinstance(trainer.strategy, WholeAdapterStrategy) else None
        model: Any = peft_model_of(OWNER, module)

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            output = model(**batch, use_cache=False) if sharded is None else sharded(batch)
            loss: Tensor = output.loss
            return loss

        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._measuring.measure(
            module if sharded is None else sharded,
            loss_of,
            module.device,
            trainer.precision_plugin.forward_context,
            micro_batches=micro_batches,
            scale=1.0 if scaler is None else scaler.get_scale(),
        )

    # Edits.

    def _planned(self, geometry: RankSpaceGeometry, mu: float) -> RetentionEdit:
        planned = retention_edit(geometry, self.estimate, mu, self.damping)
        if planned.layers == 0 and not self._tries_everything:
            rank_zero_warn(
                f"Retention: expected {geometry.config.kfac_min_samples} tokens of the task and {TOKENS_PER_RANK} of general "
                "text for each unit of rank before an edit, got fewer for every layer, so that nothing is edited. Lower "
                "Retention.every_n_steps or GeometryConfig.kfac_min_samples, or train for more steps."
            )
        return planned

    def _strongest(self, trainer: pl.Trainer, geometry: RankSpaceGeometry, tolerance: float) -> Strength:
        """Find μ by measuring the validation rows."""

        def loss_at(mu: float) -> float:
            maps = retention_edit(geometry, self.estimate, mu, self.damping).maps
            with tried(geometry, maps) if mu > 0 else nullcontext():
                return validation_loss(trainer)

        found = strongest_within(tolerance, loss_at)
        if found.mu == 0:
            rank_zero_warn(
                f"Retention.task_tolerance: expected an edit that the task can bear, got none within {tolerance:g} nats of its "
                f"loss of {found.loss_before:.4f}, so that nothing is edited. Raise it."
            )
        return found

    def _edit(
        self,
        trainer: pl.Trainer,
        geometry: RankSpaceGeometry,
        planned: RetentionEdit,
        measured: Strength | None = None,
    ) -> None:
        """Change the adapter, and write down what that is predicted to cost, and what was measured."""
        geometry.edit(planned.maps, optimizer=trainer.optimizers[0] if trainer.optimizers else None)
        self._edits += 1
        predicted = {name: value for name, value in planned._asdict().items() if name != "maps"}
        self._last_event = {"step": trainer.global_step, "mode": self.mode, **predicted}
        if measured is not None:
            losses = {"val_loss_before": measured.loss_before, "val_loss_after": measured.loss_after}
            self._last_event |= losses
        self._log_events([self._last_event])

    def _edit_at_end(
        self, trainer: pl.Trainer, geometry: RankSpaceGeometry, planned: RetentionEdit, measured: Strength | None
    ) -> None:
        """Edit, with a checkpoint of the adapter before and one after, and say so."""
        sites = [site for group in geometry.groups for site in group.sites]
        self.unedited = {site.name: site.up.weight.detach().cpu().clone() for site in sites}
        kept = save_around(trainer, lambda: self._edit(trainer, geometry, planned, measured))
        for logger in trainer.loggers:
            # Lightning's loggers count from 0
            logger.log_metrics(self._predicted_costs(), step=max(trainer.global_step - 1, 0))
        if kept is not None:
            self._last_event["unedited"] = str(kept)
        if not trainer.barebones:
            rank_zero_info(
                f"Retention: edited {planned.layers} layers at μ {planned.mu:.3g}. Predicted, in nats per token: the task "
                f"loses {planned.task_cost:.2g}, general text pays {planned.general_cost_after:.2g} after "
                f"{planned.general_cost_before:.2g}. The adapter before it: {kept or 'Retention.unedited'}."
            )

    def _predicted_costs(self) -> dict[str, float]:
        return {f"retention/{name}": value for name, value in self._last_event.items() if "cost" in name}

    # Persistence and results.

    @property
    def state_key(self) -> str:
        """A key without intervals, so that a run may be resumed with others."""
        return self._generate_state_key(mode=self.mode)

    def state_dict(self) -> dict[str, Any]:
        """Return the second estimate, the place in the text, and what has been edited; a collective."""
        if self._general is None:
            return {}
        return {**self._general.state_dict(), "edits": self._edits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what `state_dict` returned until the second estimate is there."""
        self._loaded = state_dict or None

    def _restore(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self._measuring.text.fingerprint:
            raise InvalidValueError(
                "Retention.texts: expected the general text that the checkpoint has statistics of, got something else. Set "
                "source, block_size, max_blocks, weights and the tokenizer as they were."
            )
        self._measuring.load_state_dict(state)
        self._edits = state["edits"]

    def report(self) -> dict[str, Any]:
        """Return what the last edit was predicted to cost, or the last penalty, for summary.json."""
        if self._penalty is not None:
            return {"retention": {"mode": self.mode, "mu": self.mu, "penalty": float(self._penalty)}}
        return {"retention": {"edits": self._edits, **self._last_event}} if self._last_event else {}

    # Beside others.

    def validate(self, geometry: RankSpaceGeometry) -> None:
        """Say which settings nothing reads."""
        readers = {} if self.mode == "periodic" else {"edit_every_n_steps": "mode: periodic"}
        if self.every_n_steps is None:
            readers["ema_beta"] = "every_n_steps as a number"
        if self.task_tolerance is not None and self.metric == "task":
            readers["mu"] = "task_tolerance: null"
        given = {"edit_every_n_steps": self.edit_every_n_steps, "ema_beta": self.ema_beta, "mu": self.mu}
        warn_if_ignored(Retention, given, readers)

    def validate_beside(self, others: list[ScheduledCallback]) -> None:
        """Refuse a second Retention; say if nothing asks for the metric, or a probe measures the text that is retained.

        Raises:
            ValueError: If there are two.
        """
        if any(isinstance(other, Retention) for other in others):
            raise InvalidValueError(
                "Retention: expected one at a time, got several, each of which would pull towards the backbone. Remove one."
            )
        if not any(map(orders_directions, others)):
            reader = "Reprojection, mode balanced, or RankAdaptation, rule balanced or kl_budget"
            warn_if_ignored(Retention, {"metric": self.metric}, {"metric": reader})
        assert self._text is not None
        warn_of_shared_documents(self._text, others)
