"""A mixture of tasks.

Rows come by weight and share batches, in an order of seed and epoch in which no row is seen more often than another of its
task; an epoch goes on where it stopped; each task is evaluated on its own; settings that do not fit are refused; YAML can say
all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from grit_lightning import GritLitModule
from grit_lightning.cli.program import main
from grit_lightning.datamodules import BoolQDataModule, GSM8KDataModule, MixtureDataModule
from grit_lightning.datamodules.pipeline.orders import mixed, shares

TaskCase = Any  # of conftest.py

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]


@pytest.fixture
def mixture(tokenizer: Any, cases: dict[str, TaskCase], folder: Any) -> Callable[..., MixtureDataModule]:
    """A factory of mixtures of GSM8K (9 training rows, 3 validation, 6 test) and BoolQ (12, 6, the same 6)."""
    boolq = partial(BoolQDataModule, source=str(folder(cases["boolq"])), max_length=200, eval_batch_size=4)
    gsm8k = partial(
        GSM8KDataModule, source=str(folder(cases["gsm8k"])), max_length=200, eval_batch_size=2, holdout=0.25
    )
    return lambda **options: MixtureDataModule(tokenizer, [gsm8k, boolq], **({"batch_size": 3} | options))


def drawn(module: MixtureDataModule, epoch: int = 0) -> list[str]:
    """Every training row of an epoch, decoded, in order."""
    module.setup("fit")
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    tokenizer = module.tasks["gsm8k"].tokenizer
    return [
        tokenizer.decode(ids[mask.bool()])
        for batch in loader
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def tasks_of(rows: list[str]) -> Counter[str]:
    return Counter("gsm8k" if "####" in row else "boolq" for row in rows)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"gsm8k": 9, "boolq": 12}),
        ({"weights": [1, 3], "rows_per_epoch": 20}, {"gsm8k": 5, "boolq": 15}),
        ({"weights": [2, 1], "rows_per_epoch": 40}, {"gsm8k": 27, "boolq": 13}),
    ],
)
def test_tasks_come_by_weight_and_share_batches(
    mixture: Callable[..., MixtureDataModule], options: dict[str, Any], expected: dict[str, int]
) -> None:
    rows = drawn(mixture(**options))
    assert tasks_of(rows) == expected
    if options:
        assert max(Counter(rows).values()) - min(Counter(r for r in rows if "####" in r).values()) <= 3
    else:
        assert len(set(rows)) == 21  # each once
    assert any(len(tasks_of(rows[i : i + 3])) == 2 for i in range(0, len(rows), 3))


def test_the_order_depends_on_seed_and_epoch_alone(mixture: Callable[..., MixtureDataModule]) -> None:
    first = drawn(mixture())
    assert drawn(mixture()) == first
    assert drawn(mixture(num_workers=0, seed=1)) != first
    assert drawn(mixture(), epoch=1) != first


def test_no_row_of_a_task_is_seen_twice_more_often_than_another() -> None:
    counts = Counter(row for epoch in range(7) for row in mixed([10, 4], [3, 6], seed=5, epoch=epoch))
    assert {counts[row] for row in range(10)} <= {2, 3}
    assert {counts[row] for row in range(10, 14)} <= {10, 11}
    assert sum(counts.values()) == 7 * 9


@pytest.mark.parametrize(("weights", "rows"), [([1, 1, 1], 10), ([0.2, 0.5, 0.3], 7), ([5, 1], 1)])
def test_shares_are_whole_and_within_one_of_the_exact_ones(weights: list[float], rows: int) -> None:
    found = shares(weights, rows)
    assert sum(found) == rows
    assert all(abs(n - w * rows / sum(weights)) < 1 for n, w in zip(found, weights, strict=True))


def test_a_mixture_goes_on_in_the_middle_of_an_epoch(mixture: Callable[..., MixtureDataModule]) -> None:
    whole = drawn(mixture(), epoch=2)
    stopped = mixture()
    stopped.setup("fit")
    loader = stopped.train_dataloader()
    loader.sampler.set_epoch(2)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    resumed = mixture()
    resumed.setup("fit")
    resumed.train_dataloader()
    again = resumed._train_loader
    assert again is not None
    again.load_state_dict(stopped.state_dict()["train"])
    again.sampler.set_epoch(2)
    tokenizer = resumed.tasks["boolq"].tokenizer
    rest = [
        tokenizer.decode(i[m.bool()]) for b in again for i, m in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert rest == whole[9:]
    other = mixture(weights=[1, 3])
    other.setup("fit")
    with pytest.raises(
        ValueError, match=r"got others for the rest of that epoch: .*order mixture of .*'boolq': 12.*'boolq': 16"
    ):
        other.load_state_dict(stopped.state_dict())


def test_each_task_is_evaluated_on_its_own(
    mixture: Callable[..., MixtureDataModule], make_tiny_llama: Any, lora_config: Any, tokenizer: Any
) -> None:
    lit = GritLitModule(make_tiny_llama(max_position_embeddings=256), lora_config())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    found = pl.Trainer(accelerator="cpu", **quiet).validate(lit, datamodule=mixture(), verbose=False)
    metrics = {name: value for each in found for name, value in each.items()}
    averages = [f"{macro}{name}" for macro in ("", "macro_") for name in ("precision", "recall", "f1")]
    closed = {f"val/boolq/{name}" for name in ("accuracy", *averages)}
    assert metrics.keys() == {"val/gsm8k/loss", "val/boolq/loss", *closed}
    alone = GritLitModule(make_tiny_llama(max_position_embeddings=256), lora_config())
    task = mixture().tasks["boolq"]
    (expected,) = pl.Trainer(accelerator="cpu", **quiet).validate(alone, datamodule=task, verbose=False)
    assert {name.replace("/boolq", ""): value for name, value in metrics.items() if "boolq" in name} == pytest.approx(
        expected
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1]}, r"one positive weight for each, got 2 tasks and \[1\]"),
        ({"weights": [1, 0]}, r"one positive weight for each, got 2 tasks and \[1, 0\]"),
        ({"batch_size": 0}, "at least 1, got batch_size=0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    mixture: Callable[..., MixtureDataModule], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(**options)


def test_tasks_that_pack_and_tasks_that_do_not_are_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"tasks: expected that all of them pack or none, got packing={'boolq': True, 'boolq2': False}"
    ):
        MixtureDataModule(tiny_tokenizer, [partial(BoolQDataModule, packing=True), BoolQDataModule])


def test_a_mixture_is_written_in_yaml(
    tiny_backbone_dir: Path, cases: dict[str, TaskCase], folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    settings = {"max_length": 128, "eval_batch_size": 2}
    tasks = [
        {
            "class_path": "GSM8KDataModule",
            "init_args": {**settings, "source": str(folder(cases["gsm8k"])), "calculator_annotations": False},
        },
        {"class_path": "BoolQDataModule", "init_args": {**settings, "source": str(folder(cases["boolq"]))}},
    ]
    data = {"class_path": "MixtureDataModule", "init_args": {"tasks": tasks, "weights": [1.0, 2.0], "batch_size": 3}}
    adapter = {
        "class_path": "peft.LoraConfig",
        "init_args": {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"},
    }
    trainer = {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    model = {"class_path": "GritLitModule", "init_args": {"backbone": str(tiny_backbone_dir), "adapter": adapter}}
    config = tmp_path / "mixture.yaml"
    config.write_text(yaml.safe_dump({"seed_everything": 5, "model": model, "data": data, "trainer": trainer}))
    main(["fit", "--config", str(config), "--output", str(tmp_path / "run"), "--trainer.log_every_n_steps=1"])
    record = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert [task["class_path"].rpartition(".")[2] for task in record["data"]["init_args"]["tasks"]] == [
        "GSM8KDataModule",
        "BoolQDataModule",
    ]
    torch.manual_seed(0)
