"""Evaluation by closed answers: which choice the model finds most likely, and the task's metrics of those choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torchmetrics import MetricCollection

from grit_lightning.batches import counted_rows
from grit_lightning.evaluation.choices import choice_scores
from grit_lightning.evaluation.datamodule_protocols import HasMetrics, evaluation_key


class ClosedAnswerMetrics(nn.ModuleDict):
    """The classification metrics of a module: by stage, and in a mixture by stage and task (`val/boolq`).

    It is a `ModuleDict` because Lightning looks for the metrics that it logs among the submodules of its module.
    """

    def set_up(self, datamodule: object) -> None:
        """Copy a data module's metrics, if it has any, for validation and test.

        Args:
            datamodule: Any object; see `HasMetrics`.
        """
        if not isinstance(datamodule, HasMetrics):
            return
        for stage in ("val", "test"):
            given = datamodule.metrics()
            by_task = {"": given} if given is None or isinstance(given, MetricCollection) else given
            for task, metrics in by_task.items():
                key = evaluation_key(stage, task)
                if metrics is not None and key not in self:
                    self[key] = metrics.clone(prefix=f"{key}/")

    def count(
        self,
        key: str,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        logits: Tensor,
        log_dict: Callable[..., None],
    ) -> None:
        """Update and log the metrics under a key with the choices that a model prefers; do nothing if there are none.

        Args:
            key: `val` or `test`, in a mixture with `/<task>`.
            model: As for `choice_scores`.
            batch: As for `choice_scores`, with `target` int64 `[B]`; rows whose `row` is −1 are not counted.
            logits: The model's output for this batch.
            log_dict: The module's `log_dict`.
        """
        if "choice_ids" not in batch or key not in self:
            return
        metrics = self[key]
        assert isinstance(metrics, MetricCollection)
        predicted, counted = choice_scores(model, batch, logits).argmax(-1), counted_rows(batch)
        if counted.any():
            metrics.update(predicted[counted], batch["target"][counted])
        log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(counted), add_dataloader_idx=False)
