"""ForgettingProbe: what it measures, where the results go, and that training does not notice it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from grit_lightning.callbacks import (
    AdapterCheckpoint,
    ForgettingProbe,
    RankAdaptation,
    Reprojection,
    RunRecord,
    SpectraLogger,
    StepTimer,
)
from grit_lightning.callbacks.forgetting import FILENAME
from grit_lightning.forgetting import TextData
from grit_lightning.geometry.config import GeometryConfig
from grit_lightning.module import GritLitModule
from grit_lightning.optimizers import EigenbasisAdam
from grit_lightning.runs.folder import clear
from grit_lightning.runs.metrics_log import JSONLinesLogger

Factory = Callable[..., Any]

TEXT = "The cat sat on the mat, and the dog ran after the cat. " * 6
QUESTIONS: list[dict[str, Any]] = [
    {"question": f"Is {n} even?", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "AB"[n % 2]}
    for n in range(5)
]
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

QUESTIONS[-1]["question"] = "very " * 40 + QUESTIONS[-1]["question"]  # longer than the context of 128 bytes
FLOAT32_ROUNDING = 1e-5  # of a mean loss, between batches of different shape


@pytest.fixture
def probe(tmp_path: Path, tiny_backbone_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ForgettingProbe]:
    """A factory of probes: 7 blocks of 32 tokens of one text, and 5 questions; keywords override."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    (data / "prose.txt").write_text(TEXT)
    (data / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    def make(**overrides: Any) -> ForgettingProbe:
        settings: dict[str, Any] = {
            "texts": [TextData(str(data / "prose.txt"))],
            "zero_shot": [{"schema": "arc_easy", "source": str(data / "arc.jsonl")}],
            "block_size": 32,
            "max_blocks": 7,
            "batch_size": 3,
            "tokenizer": str(tiny_backbone_dir),
        }
        return ForgettingProbe(**(settings | overrides))

    return make


@pytest.fixture
def quick_module(make_tiny_llama: Factory, lora_config: Factory) -> Factory:
    """A module that learns in a few steps, with dropout; keywords override."""

    def make(adapter: Mapping[str, Any] | None = None, **overrides: Any) -> GritLitModule:
        settings: dict[str, Any] = {
            "geometry": GeometryConfig(kfac_update_freq=2, kfac_min_samples=1),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            "lr_scheduler": None,
        }
        torch.manual_seed(3)
        config = lora_config(**({"lora_dropout": 0.2} | dict(adapter or {})))
        return GritLitModule(make_tiny_llama(), config, **(settings | overrides))

    return make


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in found]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


# What is measured.


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_before_is_the_backbone_and_the_backbone_stays(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory, tmp_path: Path, precision: str
) -> None:
    trainer = make_trainer(callbacks=[probe(), RunRecord()], logger=JSONLinesLogger(tmp_path), precision=precision)
    trainer.fit(quick_module(), loader(6))
    row = summary(tmp_path)["forgetting"]["prose"]["loss"]
    assert row["before"] == row["adapter_off_before"] == row["adapter_off_after"]  # to the bit: B = 0
    written = lines(tmp_path, "forgetting.jsonl")

    def nats(when: str, adapter: bool) -> list[float]:
        return [e["nats"] for e in written if (e["when"], e["adapter"]) == (when, adapter) and "nats" in e]

    assert nats("before", True) == nats("before", False) == nats("after", False) != nats("after", True)
    assert abs(row["delta"]) > 1e-3  # so that the rest of the test means something
    assert row["interval"][0] < row["delta"] < row["interval"][1]
    assert row["delta"] == pytest.approx(row["after"] - row["before"], abs=1e-12)


def test_losses_are_those_of_transformers(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    module = quick_module()
    make_trainer(callbacks=[probe(), RunRecord()]).fit(module, loader(6))
    found = summary(tmp_path)["forgetting"]
    stream = torch.tensor(tiny_tokenizer(TEXT, add_special_tokens=False).input_ids)
    module.peft_model.eval()
    with torch.no_grad():
        rows = stream[: 7 * 32].view(7, 1, 32)
        after = torch.stack([module.peft_model(row, labels=row).loss for row in rows]).mean()
        with module.peft_model.disable_adapter():
            before = torch.stack([module.peft_model(row, labels=row).loss for row in rows]).mean()
    assert (found["prose"]["blocks"], found["prose"]["tokens"]) == (7, 7 * 31)
    assert found["prose"]["loss"]["after"] == pytest.approx(float(after), abs=FLOAT32_ROUNDING)
    assert found["prose"]["loss"]["before"] == pytest.approx(float(before), abs=FLOAT32_ROUNDING)
    assert found["arc_easy"]["questions"] == 5
    assert 0 <= found["arc_easy"]["acc_norm"]["after"] <= 1


def test_a_backbone_that_moves_is_reported(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory
) -> None:
    class Moves(Callback):
        @torch.no_grad()
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.peft_model.get_base_model().model.norm.weight.mul_(1.2)

    with pytest.warns(UserWarning, match="without its adapter the model's loss on prose went from"):
        make_trainer(callbacks=[probe(), Moves()]).fit(quick_module(), loader(2))


# Training does not notice.


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}/{index}")
    else:
        yield name, value.tolist() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("geometry", [True, False], ids=["geometry", "plain adapter"])
def test_a_run_with_the_probe_is_to_the_bit_the_run_without(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory, tmp_path: Path, geometry: bool
) -> None:
    def train(*callbacks: Callback) -> dict[str, Any]:
        steers = [
            Reprojection("balanced", every_n_steps=2),
            RankAdaptation(every_n_steps=3, threshold=0.9, min_rank=1, mixing_probability=0.5),
        ]
        module = quick_module(
            **({"optimizer": lambda p: EigenbasisAdam(p, lr=1e-2)} if geometry else {"geometry": None})
        )
        trainer = make_trainer(callbacks=[*callbacks, *(steers if geometry else [])], accumulate_grad_batches=2)
        pl.seed_everything(5, verbose=False)
        trainer.fit(module, loader(12))
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        saved: dict[str, Any] = torch.load(tmp_path / "end.ckpt", weights_only=True)
        saved["callbacks"].pop("ForgettingProbe", None)
        return saved

    without = dict(leaves(train()))
    with_probe = dict(leaves(train(probe(every_n_steps=1))))
    assert {name.split("/")[1] for name in without} >= {"state_dict", "optimizer_states", "grit"}
    assert [name for name in without.keys() | with_probe.keys() if without.get(name) != with_probe.get(name)] == []


# Where results go.


def test_loggers_get_values_and_changes(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory, tmp_path: Path
) -> None:
    tensorboard = TensorBoardLogger(tmp_path, name="", version="")
    seen: dict[str, list[int]] = {}
    original = tensorboard.log_metrics

    def log_metrics(metrics: Mapping[str, float], step: int | None = None) -> None:
        for key in metrics:
            seen.setdefault(key, []).append(-1 if step is None else step)
        original(metrics, step)

    tensorboard.log_metrics = log_metrics  # type: ignore[method-assign,assignment]
    trainer = make_trainer(
        callbacks=[probe(every_n_steps=2), SpectraLogger(every_n_steps=2), StepTimer(every_n_steps=2)],
        logger=[JSONLinesLogger(tmp_path), tensorboard],
        max_steps=6,
        max_epochs=-1,
    )
    trainer.fit(quick_module(), loader(6))
    written: dict[str, list[int]] = {}
    for line in lines(tmp_path, "metrics.jsonl"):
        for key in line.keys() - {"step", "epoch"}:
            written.setdefault(key, []).append(line["step"])
    expected = {
        **{f"forgetting/{name}": [0, 1, 3, 5] for name in ("prose/loss", "arc_easy/acc", "arc_easy/acc_norm")},
        **{f"forgetting/{name}_delta": [0, 1, 3, 5] for name in ("prose/loss", "arc_easy/acc", "arc_easy/acc_norm")},
        "forgetting/prose/loss_adapter_off": [0, 5],
    }
    for name in [name for name in expected if name.endswith("_delta")]:
        expected[name] = [1, 3, 5]
    assert {key: steps for key, steps in written.items() if key.startswith("forgetting/")} == expected
    assert {key: steps for key, steps in seen.items() if key.startswith("forgetting/")} == expected
    assert trainer.callback_metrics["forgetting/prose/loss_delta"]  # for early stopping; of step 4
    events = lines(tmp_path, "forgetting.jsonl")
    assert [e["block"] for e in events if e["when"] == "after" and e["adapter"] and e["data"] == "prose"] == [*range(7)]
    questions = [e for e in events if e["when"] == "after" and e["data"] == "arc_easy"]
    assert [e["question"] for e in questions] == [*range(5)]
    assert all(len(e["log_likelihoods"]) == 2 and {e["acc"], e["acc_norm"]} <= {0.0, 1.0} for e in questions)


def test_the_record_and_the_table_show_the_change(
    quick_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    probe: Factory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_trainer(callbacks=[RunRecord(), probe(confidence=0.9)]).fit(quick_module(), loader(4))
    row = summary(tmp_path)["forgetting"]["prose"]["loss"]
    shown = capsys.readouterr().out
    for text in ("prose loss", f"{row['before']:.4f}", f"{row['delta']:+.4f}", "90% interval", "arc_easy acc_norm"):
        assert text in shown
    assert f"{row['interval'][0]:+.4f} … {row['interval'][1]:+.4f}" in shown


@pytest.mark.parametrize(
    "settings", [{"fast_dev_run": True}, {"barebones": True}, {}], ids=["dev", "barebones", "no logger"]
)
def test_without_logger_and_in_short_runs(
    quick_module: Factory,
    loader: Factory,
    probe: Factory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    quiet = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
    }
    trainer = pl.Trainer(
        callbacks=[callback := probe(every_n_steps=1)],
        accelerator="cpu",
        max_steps=2,
        **({} if "barebones" in settings else quiet),
        **settings,
    )
    trainer.fit(quick_module(geometry=None), loader(2))
    report = callback.report()
    if "barebones" in settings:
        assert report == {}
    else:
        blocks = 3 if "fast_dev_run" in settings else 7  # one batch
        assert report["forgetting"]["prose"]["blocks"] == blocks
        assert report["forgetting"]["prose"]["loss"]["delta"] is not None
    assert list(folder.iterdir()) == []


def test_a_run_that_fails_records_what_was_measured(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory, tmp_path: Path
) -> None:
    class Fails(Callback):
        def on_after_backward(self, *_: Any) -> None:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        make_trainer(callbacks=[RunRecord(), probe(), Fails()]).fit(quick_module(), loader(2))
    row = summary(tmp_path)["forgetting"]["prose"]["loss"]
    assert row["before"] > 0
    assert row["after"] is row["delta"] is row["interval"] is None


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_share_the_work_and_get_the_same(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory, tmp_path: Path
) -> None:
    make_trainer(callbacks=[RunRecord(), probe()]).fit(quick_module({"lora_dropout": 0.0}, geometry=None), loader(1))
    alone = summary(tmp_path)["forgetting"]
    module = quick_module({"lora_dropout": 0.0}, geometry=None)
    module.configure_model()  # forked processes hand their weights back to this one
    make_trainer(
        callbacks=[RunRecord(), probe()],
        logger=JSONLinesLogger(tmp_path),
        strategy="ddp_fork",
        devices=2,
        use_distributed_sampler=False,
    ).fit(module, loader(1))
    shared = summary(tmp_path)["forgetting"]
    assert (shared["prose"]["blocks"], shared["prose"]["tokens"], shared["arc_easy"]["questions"]) == (7, 217, 5)
    for when in ("before", "after", "delta", "adapter_off_before", "adapter_off_after"):
        assert shared["prose"]["loss"][when] == pytest.approx(alone["prose"]["loss"][when], abs=FLOAT32_ROUNDING)
    assert shared["arc_easy"]["acc"]["before"] == alone["arc_easy"]["acc"]["before"]
    events = lines(tmp_path, "forgetting.jsonl")
    assert len([e for e in events if e["when"] == "before" and e["adapter"]]) == 7 + 5  # one process writes


# Resuming.


class Stopped(Exception):  # noqa: N818
    """Ends a run where a signal might have."""


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Stopped


def test_a_resumed_run_knows_what_was_before_and_writes_the_same(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory, tmp_path: Path
) -> None:
    def run(name: str, *callbacks: Callback, resume: bool = False, **settings: Any) -> Path:
        folder = tmp_path / name
        same = DataLoader([next(iter(loader(1)))] * 8, batch_size=None)  # Lightning does not know where it was in these
        pl.seed_everything(5, verbose=False)
        own = [probe(every_n_steps=2, **settings), RunRecord(str(folder)), AdapterCheckpoint(folder / "checkpoints", 2)]
        make_trainer(
            callbacks=[*own, *callbacks],
            logger=JSONLinesLogger(folder),
            default_root_dir=folder,
            enable_checkpointing=True,
            max_steps=6,
            max_epochs=-1,
        ).fit(quick_module(), same, ckpt_path=folder / "checkpoints" / "last.ckpt" if resume else None)
        return folder

    whole = run("whole")
    with pytest.raises(Stopped):
        run("stopped", StopAt(5))
    resumed = run("stopped", resume=True)
    assert summary(resumed)["forgetting"] == summary(whole)["forgetting"]
    for name in ("forgetting.jsonl", "metrics.jsonl"):
        assert lines(resumed, name) == lines(whole, name)
    with pytest.raises(Stopped):
        run("changed", StopAt(3))
    with pytest.raises(
        ValueError, match="expected prose to hold what the checkpoint measured before training, got something else"
    ):
        run("changed", resume=True, block_size=16)


def test_a_run_that_replaces_another_replaces_its_measurements(tmp_path: Path) -> None:
    (tmp_path / FILENAME).touch()
    clear(tmp_path)
    assert not (tmp_path / FILENAME).exists()


def test_a_probe_that_comes_later_says_that_it_has_no_before(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory, tmp_path: Path
) -> None:
    trainer = make_trainer(max_steps=2, max_epochs=-1)
    trainer.fit(quick_module(), loader(4))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    later = probe()
    with pytest.warns(UserWarning, match="training goes on from step 2, and the checkpoint holds no measurement"):
        make_trainer(max_steps=3, max_epochs=-1, callbacks=[later]).fit(
            quick_module(), loader(4), ckpt_path=tmp_path / "end.ckpt"
        )
    row = later.report()["forgetting"]["prose"]["loss"]
    assert row["before"] is row["delta"] is None
    assert row["after"] != row["adapter_off_after"]


# What is refused.


def test_blocks_longer_than_the_context_are_refused(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory
) -> None:
    with pytest.raises(ValueError, match=r"at most 128 tokens, .* got 256 for a block of text\. Lower Forgetting"):
        make_trainer(callbacks=[probe(block_size=256)]).fit(quick_module(), loader(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": None, "zero_shot": None}, "expected something to measure, got neither texts nor zero_shot tasks"),
        (
            {"texts": [TextData("a/x.txt"), TextData("b/x.txt")]},
            "expected data sets with different names, got several called x",
        ),
        ({"block_size": 1}, "block_size: expected an integer ≥ 2, got 1"),
        ({"max_blocks": 0}, "max_blocks: expected an integer ≥ 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected an integer ≥ 1, got 0"),
        ({"every_n_steps": 0}, "every_n_steps.* an integer ≥ 1"),
        ({"confidence": 1.0}, r"confidence: expected a number in \(0, 1\), got 1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(probe: Factory, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(**settings)


def test_a_model_without_adapter_and_a_run_without_tokenizer_are_refused(
    quick_module: Factory, loader: Factory, make_trainer: Factory, probe: Factory
) -> None:
    class Plain(pl.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("never trained")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])

    with pytest.raises(Exception, match=r"expected Plain\.model to be a PEFT model, .* got NoneType"):
        make_trainer(callbacks=[probe()]).fit(Plain(), loader(1))
    with pytest.raises(Exception, match=r"ForgettingProbe\.tokenizer: expected a tokenizer .*, got none"):
        make_trainer(callbacks=[probe(tokenizer=None)]).fit(quick_module(), loader(1))
