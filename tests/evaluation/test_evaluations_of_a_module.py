"""What the module's two collections of evaluations do with a data module: only what it has and the settings ask for.

- metrics of closed answers are copied for validation and test, in a mixture task by task, and a module without any trains;
- answers are generated at the stages that are asked for, and a prediction's scores are not logged;
- any `LightningDataModule` trains and is evaluated by its loss.
"""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from grit_lightning import GenerationSettings, GritLitModule
from grit_lightning.evaluation import datamodule_protocols
from grit_lightning.evaluation.choices import classification_metrics
from grit_lightning.evaluation.closed_answers import ClosedAnswerMetrics
from grit_lightning.evaluation.datamodule_protocols import GenerativeTask, HasMaxLength, HasMetrics, HasTasks, tasks_of
from grit_lightning.evaluation.generated_answers import AnswerEvaluation, AnswerEvaluations

CPU = torch.device("cpu")


class Task:
    """A task of free answers, as small as it can be."""

    tokenizer: Any = None
    choices = ()
    text_metrics = ("exact_match",)

    def examples(self, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"reference": ["#### 1"], "target": [-1], "prompt_length": [1]})

    def metrics(self) -> Any:
        return classification_metrics(2)


class Mixture:
    def __init__(self) -> None:
        self.tasks = {"sums": Task(), "words": Task()}

    def metrics(self) -> Any:
        return {"sums": classification_metrics(2), "words": None}


class Nothing(pl.LightningDataModule):
    """No more than Lightning asks for."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([self.batch], batch_size=None)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


@pytest.mark.parametrize(
    ("datamodule", "keys"),
    [(Task(), {"val", "test"}), (Mixture(), {"val/sums", "test/sums"}), (object(), set()), (None, set())],
    ids=["task", "mixture", "nothing", "none"],
)
def test_metrics_are_copied_for_every_task_that_has_some(datamodule: Any, keys: set[str]) -> None:
    metrics = ClosedAnswerMetrics()
    metrics.set_up(datamodule)
    assert set(metrics) == keys
    before = [*metrics.values()]
    metrics.set_up(datamodule)  # for the next stage: what has been counted stays
    assert all(one is other for one, other in zip(before, metrics.values(), strict=True))
    assert all(metric.prefix == f"{key}/" for key, metric in metrics.items())


@pytest.mark.parametrize(
    ("stage", "keys"),
    [("fit", {"val"}), ("validate", {"val"}), ("test", set()), ("predict", {"predict"})],
)
def test_answers_are_generated_at_the_stages_that_are_asked_for(stage: str, keys: set[str]) -> None:
    evaluations = AnswerEvaluations(GenerationSettings(stages=("val", "predict")))
    evaluations.set_up(stage, Task(), CPU)
    assert set(evaluations) == keys
    silent = AnswerEvaluations(None)
    silent.set_up(stage, object(), CPU)  # nothing is asked of it
    assert not set(silent)
    assert silent.answer("val", None, {}, first=True, rank=0, ranks=1) == []  # type: ignore[arg-type]


def test_scores_are_logged_task_by_task_under_the_path_of_their_metric_but_not_of_a_prediction() -> None:
    holder = torch.nn.Module()
    holder.here = AnswerEvaluations(GenerationSettings())
    logged: dict[str, Any] = {}

    def log(name: str, metric: Any, metric_attribute: str, **_: Any) -> None:
        assert holder.get_submodule(metric_attribute) is metric
        logged[name] = metric

    for stage in ("test", "predict"):
        holder.here.set_up(stage, Mixture(), CPU)
        for key in [*holder.here, f"{stage}/unknown"]:
            holder.here.log_scores(key, log, "here")
    names = ("exact_match", "exact_match_flexible")
    assert logged.keys() == {f"test/{task}/{name}" for task in ("sums", "words") for name in names}


def test_rows_of_a_mixture_know_their_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AnswerEvaluation, "forward", lambda self, *_: [{"row": 0}])
    evaluations = AnswerEvaluations(GenerationSettings())
    evaluations.set_up("test", Mixture(), CPU)
    alone = AnswerEvaluations(GenerationSettings())
    alone.set_up("test", Task(), CPU)
    where: Any = {"first": True, "rank": 0, "ranks": 1}
    assert evaluations.answer("test/words", None, {}, **where) == [{"task": "words", "row": 0}]  # type: ignore[arg-type]
    assert alone.answer("test", None, {}, **where) == [{"row": 0}]  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")
def test_a_data_module_that_offers_nothing_trains_and_is_evaluated_by_its_loss(
    make_tiny_llama: Callable[..., Any],
    lora_config: Callable[..., Any],
    random_batch: Callable[..., Any],
    tmp_path: Any,
) -> None:
    data = Nothing(random_batch())
    assert not any(isinstance(data, protocol) for protocol in (HasMaxLength, HasMetrics, HasTasks, GenerativeTask))
    assert tasks_of(data) == {"": data}
    module = GritLitModule(make_tiny_llama(), lora_config())
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, enable_model_summary=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics.keys() == {"train/loss", "val/loss"}


def test_the_shipped_data_modules_have_what_is_asked_for(tiny_tokenizer: Any, tmp_path: Any) -> None:
    from grit_lightning.datamodules import BoolQDataModule, MixtureDataModule

    task = BoolQDataModule(tiny_tokenizer, source=str(tmp_path))
    mixture = MixtureDataModule(tiny_tokenizer, [lambda tokenizer: BoolQDataModule(tokenizer, source=str(tmp_path))])
    assert all(isinstance(task, protocol) for protocol in (HasMaxLength, HasMetrics, GenerativeTask))
    assert all(isinstance(mixture, protocol) for protocol in (HasMaxLength, HasMetrics, HasTasks))
    assert tasks_of(mixture).keys() == {"boolq"}


def test_examples_in_docstrings_hold() -> None:
    result = doctest.testmod(datamodule_protocols)
    assert result.attempted > 0
    assert result.failed == 0
