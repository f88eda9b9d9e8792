"""How much of its pretraining a model forgets while it is fine-tuned (ΔL_pt in the paper's forgetting laws)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from grit_lightning.backbones.inputs import context_length, require_context
from grit_lightning.callbacks.base import ScheduledCallback
from grit_lightning.callbacks.event_log import EventLog
from grit_lightning.callbacks.lookup import peft_model_of, tokenizer_for
from grit_lightning.errors import InvalidValueError, require
from grit_lightning.forgetting.change import mean_change
from grit_lightning.forgetting.held_out import HeldOutSet, TextBlocks
from grit_lightning.forgetting.likelihood import log_likelihoods
from grit_lightning.forgetting.text import TextData
from grit_lightning.forgetting.without_trace import adapter_off, evaluating_without_trace
from grit_lightning.forgetting.zero_shot import ZeroShotTask
from grit_lightning.runs.writing import is_dev_run

OWNER = "ForgettingProbe"  # of the settings, in messages
FILENAME = "forgetting.jsonl"
BACKBONE_TOLERANCE = 1e-3
"""Nats per token by which the loss without adapter may move: after a resume, another machine may round differently."""

Scores = dict[str, Tensor]
"""Log-likelihoods of the sequences of each held-out set, by its name."""


class ForgettingProbe(ScheduledCallback):
    """Measures the loss on held-out text and zero-shot accuracies before, during and after training.

    ΔL_pt = L_pt(after) − L_pt(before), in nats per token, with a bootstrap interval that is paired over blocks of text (over
    questions for accuracies). The loss of the backbone alone, with the adapter switched off, is measured at the start and at
    the end too: it must not change, and a warning says so if it does.

    Loggers get `forgetting/<name>/<metric>` and `forgetting/<name>/<metric>_delta`, with the metrics `loss` of texts, `acc`
    and `acc_norm` of questions, and `forgetting/<name>/loss_adapter_off`. `RunRecord` puts the results into summary.json
    under `forgetting`, and the numbers of each block and question go into `forgetting.jsonl` in the run's folder, if the run
    has loggers.

    Training goes on as if there were no probe: same weights, same random numbers, same statistics. A resumed run takes
    the values before training from its checkpoint. Several processes share the work. In `fast_dev_run` one batch of each
    data set is measured, in a barebones Trainer none.

    Args:
        texts: Held-out texts, proxies of the pretraining data.
        zero_shot: Multiple-choice benchmarks.
        block_size: Tokens of a block of text; at most the model's context.
        max_blocks: Blocks of each text, from its start; None for all.
        batch_size: Blocks, or options of questions, in a forward pass of a process.
        every_n_steps: Optimizer steps between measurements during training; None measures before and after only.
        start_step: First optimizer step at which to measure during training.
        stop_step: Last such step; None for no end.
        confidence: Level of the intervals, in (0, 1).
        tokenizer: Hub id or folder of the tokenizer; None for the data module's, or else the backbone's.

    Raises:
        ValueError: If there is nothing to measure, a setting is out of range, or two data sets have the same name.
    """

    def __init__(
        self,
        texts: list[TextData] | None = None,
        zero_shot: list[ZeroShotTask] | None = None,
        block_size: int = 512,
        max_blocks: int | None = 64,
        batch_size: int = 4,
        every_n_steps: int | None = None,
        start_step: int = 0,
        stop_step: int | None = None,
        confidence: float = 0.95,
        tokenizer: str | None = None,
    ) -> None:
        """Check and remember the settings; data are read in `setup`."""
        super().__init__(every_n_steps, start_step, stop_step, EventLog(FILENAME))
        for name, value, least in (
            ("block_size", block_size, 2),
            ("max_blocks", max_blocks, 1),
            ("batch_size", batch_size, 1),
        ):
            require("ForgettingProbe", name, value is None or value >= least, f"an integer ≥ {least}", value)
        require("ForgettingProbe", "confidence", 0.0 < confidence < 1.0, "a number in (0, 1)", confidence)
        self.texts = [TextData(**text) if isinstance(text, Mapping) else text for text in texts or []]
        self.zero_shot = [ZeroShotTask(**task) if isinstance(task, Mapping) else task for task in zero_shot or []]
        names = [text.label for text in self.texts] + [task.label for task in self.zero_shot]
        if not names:
            raise InvalidValueError(
                "ForgettingProbe: expected something to measure, got neither texts nor zero_shot tasks. Set either of them."
            )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidValueError(
                f"ForgettingProbe: expected data sets with different names, got several called {', '.join(twice)}. Set `name`."
            )
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.batch_size = batch_size
        self.confidence = confidence
        self.tokenizer = tokenizer
        self._sets: list[HeldOutSet] = []
        self._fingerprints: dict[str, str] = {}
        self._before: Scores = {}
        self._after: Scores = {}
        self._backbone: tuple[Scores, Scores] = ({}, {})  # without adapter: at the start, at the end
        self._skips_state = False

    # Trainer hooks.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the data, on every process, before anything is trained.

        Raises:
            FileNotFoundError: If data are missing.
            ValueError: If data cannot be used as they are.
            ConnectionError: If the hub cannot be reached.
            MisconfigurationException: If no tokenizer can be found.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or trainer.barebones:
            return
        dev_run = is_dev_run(trainer)
        tokenizer = tokenizer_for(OWNER, self.tokenizer, trainer, pl_module)
        blocks = min(self.batch_size, self.max_blocks or self.batch_size) if dev_run else self.max_blocks
        texts = [text.read(tokenizer, self.block_size, blocks) for text in self.texts]
        questions = [task.read(tokenizer, self.batch_size if dev_run else None) for task in self.zero_shot]
        self._sets = [*texts, *questions]
        self._fingerprints = {held_out.name: held_out.fingerprint for held_out in self._sets}
        self._skips_state = dev_run  # its blocks are not those of a checkpoint

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the model can be measured.

        Raises:
            MisconfigurationException: If the module has no PEFT model, so that there is no adapter to switch off.
            ValueError: If blocks are longer than the model's context.
        """
        model = peft_model_of(OWNER, pl_module)
        if self.texts:
            require_context(model, self.block_size, "a block of text", "ForgettingProbe.block_size")
        if (context := context_length(model)) is not None:
            self._sets = [held_out.within(context) for held_out in self._sets]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what can be forgotten; a resumed run has done so already."""
        super().on_train_start(trainer, pl_module)
        self._after = {}
        if trainer.global_step == 0:
            self._before = self._measure(trainer, pl_module, "before")
            self._backbone = (self._measure(trainer, pl_module, "before", without_adapter=True), {})
        elif self._sets and not self._before:
            rank_zero_warn(
                f"ForgettingProbe: training goes on from step {trainer.global_step}, and the checkpoint holds no measurement "
                "from before it. There will be no change to report; the backbone without adapter is measured all the same."
            )

    def on_due_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure during training, so that early stopping and checkpoints can monitor the values."""
        if trainer.global_step == trainer.max_steps:
            return  # `on_train_end` is next
        scores = self._measure(trainer, pl_module, "during")
        pl_module.log_dict(self._metrics(scores), logger=False, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what is left, and whether the backbone is still the same."""
        self._after = self._measure(trainer, pl_module, "after")
        end = self._measure(trainer, pl_module, "after", without_adapter=True)
        self._backbone = (self._backbone[0], end)
        for held_out in self._sets:
            row = self._row(held_out, "loss") if isinstance(held_out, TextBlocks) else {}
            start, now = row.get("adapter_off_before"), row.get("adapter_off_after")
            if start is not None and now is not None and not abs(now - start) <= BACKBONE_TOLERANCE:
                rank_zero_warn(
                    f"ForgettingProbe: without its adapter the model's loss on {held_out.name} went from {start:.4f} to "
                    f"{now:.4f} nats per token, but nothing outside the adapter should have been trained. Look for trained "
                    "biases (adapter.bias), or for other code that changes the backbone."
                )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run cannot measure again."""
        return {"fingerprints": self._fingerprints, "before": dict(self._before), "backbone": dict(self._backbone[0])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the values from before training.

        Raises:
            ValueError: If they were measured on other data than this run would measure after training.
        """
        if self._skips_state:
            return
        for name, fingerprint in self._fingerprints.items():
            if state_dict["fingerprints"].get(name, fingerprint) != fingerprint:
                raise InvalidValueError(
                    f"ForgettingProbe: expected {name} to hold what the checkpoint measured before training, got something "
                    "else. Set its source, block_size, max_blocks or limit, and the tokenizer, as they were, or rename it."
                )
        self._before, self._backbone = dict(state_dict["before"]), (dict(state_dict["backbone"]), {})

    @property
    def state_key(self) -> str:
        """A key without settings, so that a run may be resumed with another interval."""
        return type(self).__qualname__

    # Results.

    @property
    def text_blocks(self) -> list[TextBlocks]:
        """The texts as they are measured, known from `setup` on."""
        return [held_out for held_out in self._sets if isinstance(held_out, TextBlocks)]

    def report(self) -> dict[str, Any]:
        """Return results for summary.json, by data set: its size and, for each metric, what `_row` says."""
        if not self._before and not self._after:
            return {}
        rows = {
            held_out.name: {**held_out.size, **{metric: self._row(held_out, metric) for metric in held_out.metrics}}
            for held_out in self._sets
        }
        return {"forgetting": rows}

    def _row(self, held_out: HeldOutSet, metric: str) -> dict[str, Any]:
        """Return before, after, delta and its interval; for texts also adapter_off_before and _after; None if missing."""
        before, after = self._before.get(held_out.name), self._after.get(held_out.name)
        row: dict[str, Any] = {"before": _mean(held_out, metric, before), "after": _mean(held_out, metric, after)}
        row |= {"delta": None, "interval": None, "confidence": self.confidence}
        if before is not None and after is not None:
            values = held_out.values(before)[metric], held_out.values(after)[metric]
            row["delta"], row["interval"] = mean_change(*values, held_out.weights, self.confidence)
        if isinstance(held_out, TextBlocks):
            for when, scores in zip(("before", "after"), self._backbone, strict=True):
                row[f"adapter_off_{when}"] = _mean(held_out, metric, scores.get(held_out.name))
        return row

    def _metrics(self, scores: Scores) -> dict[str, float]:
        """Return means for the loggers, and their changes where there is a value from before training."""
        logged = {}
        for held_out in self._sets:
            for metric in held_out.metrics:
                key = f"forgetting/{held_out.name}/{metric}"
                logged[key] = now = _mean(held_out, metric, scores.get(held_out.name))
                if (start := _mean(held_out, metric, self._before.get(held_out.name))) is not None and now is not None:
                    logged[f"{key}_delta"] = now - start
        return {key: value for key, value in logged.items() if value is not None}

    # Measuring.

    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, when: str, *, without_adapter: bool = False
    ) -> Scores:
        """Score every set on all processes (texts only without adapter), log and write them; return float64 on the CPU."""
        sets = [held_out for held_out in self._sets if isinstance(held_out, TextBlocks) or not without_adapter]
        if not sets:
            return {}
        model: Any = trainer.strategy.model  # as the strategy has wrapped it
        switch = adapter_off(peft_model_of(OWNER, pl_module)) if without_adapter else nullcontext()
        scores = {}
        with evaluating_without_trace(model, pl_module.device), switch, trainer.precision_plugin.forward_context():
            for held_out in sets:
                own = log_likelihoods(
                    lambda batch: model(batch, with_loss=False, trim=True).logits,
                    held_out.sequences,
                    self.batch_size,
                    pl_module.device,
                    rank=trainer.global_rank,
                    world_size=trainer.world_size,
                )
                scores[held_out.name] = trainer.strategy.reduce(own, reduce_op="sum").cpu().double()
        self._publish(trainer, sets, scores, when, without_adapter)
        return scores

    def _publish(
        self, trainer: pl.Trainer, sets: Sequence[HeldOutSet], scores: Scores, when: str, without_adapter: bool
    ) -> None:
        metrics = self._metrics(scores)
        if without_adapter:
            metrics = {f"{key}_adapter_off": value for key, value in metrics.items() if not key.endswith("_delta")}
        metrics["epoch"] = trainer.current_epoch
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=max(trainer.global_step - 1, 0))  # Lightning's loggers count from 0
        head = {"step": trainer.global_step, "when": when, "adapter": not without_adapter}
        self._log_events(_lines(head, sets, scores))


def _mean(held_out: HeldOutSet, metric: str, scores: Tensor | None) -> float | None:
    return None if scores is None else float(held_out.values(scores)[metric].sum() / held_out.weights.sum())


def _lines(head: Mapping[str, Any], sets: Iterable[HeldOutSet], scores: Scores) -> Iterable[dict[str, Any]]:
    for held_out in sets:
        for index, line in enumerate(held_out.describe(scores[held_out.name])):
            yield {**head, "data": held_out.name, held_out.unit: index, **line}
