"""The edit at the end comes before everything that looks at the result, and what it was made from is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from grit_lightning.callbacks import AdapterCheckpoint, ForgettingProbe, Retention, RunRecord
from grit_lightning.runs.metrics_log import JSONLinesLogger

from .test_without_trace import different

Factory = Callable[..., Any]


@pytest.fixture
def probe(tmp_path: Path, tiny_backbone_dir: Path) -> ForgettingProbe:
    """Measures other text."""
    (tmp_path / "other.txt").write_text("The cat sat on the mat, and the dog ran after the cat. " * 6)
    text = {"source": str(tmp_path / "other.txt")}
    return ForgettingProbe([text], block_size=32, max_blocks=4, tokenizer=str(tiny_backbone_dir))  # type: ignore[list-item]


def columns(path: Path) -> dict[str, Any]:
    """B of every layer in a checkpoint, by the layer's name."""
    state = torch.load(path, weights_only=True)["state_dict"]
    return {
        name.removeprefix("model.").partition(".lora_B")[0]: value for name, value in state.items() if "lora_B" in name
    }


@pytest.mark.parametrize("order", ["before", "behind"])
def test_probe_and_last_checkpoint_see_the_edited_adapter_wherever_it_stands(
    quick_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    retention: Factory,
    probe: ForgettingProbe,
    tmp_path: Path,
    order: str,
) -> None:
    module, folder = quick_module(), tmp_path / "run"
    found, saver = retention(mu=5.0), AdapterCheckpoint(folder / "checkpoints", every_n_steps=2)
    placed = [found, probe] if order == "before" else [probe, found]
    trainer = make_trainer(
        callbacks=[*placed, RunRecord(str(folder)), saver],
        logger=JSONLinesLogger(folder),
        enable_checkpointing=True,
        max_steps=4,
        max_epochs=-1,
    )
    trainer.fit(module, loader(8))
    sites = {site.name: site.up.weight.detach() for site in module.geometry.groups[0].sites}
    edited, unedited = columns(folder / "checkpoints/last.ckpt"), columns(folder / "checkpoints/unedited.ckpt")
    for name, b in sites.items():
        assert torch.equal(edited[name], b)
        assert torch.equal(unedited[name], found.unedited[name])
        assert not torch.equal(unedited[name], b)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "last.ckpt",
        "unedited.ckpt",
        Path(saver.best_model_path).name,
    }
    summary = json.loads((folder / "summary.json").read_text())
    report = summary["retention"]
    assert (report["mode"], report["mu"], report["layers"], report["edits"], report["step"]) == ("at_end", 5.0, 4, 1, 4)
    assert 0 < report["general_cost_after"] < report["general_cost_before"]
    assert report["unedited"] == str(folder / "checkpoints/unedited.ckpt")
    assert json.loads((folder / "retention.jsonl").read_text())["task_cost"] == report["task_cost"]
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (cost,) = [line["retention/task_cost"] for line in logged if "retention/task_cost" in line]
    assert cost == pytest.approx(report["task_cost"])

    trainer.validate(module, loader(1), verbose=False)  # the probe's `after` is of the weights that are left
    again = ForgettingProbe(probe.texts, block_size=32, max_blocks=4, tokenizer=probe.tokenizer)
    later = make_trainer(callbacks=[again], max_steps=1, max_epochs=-1)
    later.fit(module, loader(1))
    before = again.report()["forgetting"]["other"]["loss"]["before"]
    assert before == pytest.approx(summary["forgetting"]["other"]["loss"]["after"], rel=1e-6)


def test_a_run_goes_on_from_the_unedited_adapter_as_if_it_had_not_ended(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory, tmp_path: Path
) -> None:
    def run(name: str, steps: int, resume: bool = False) -> dict[str, Any]:
        pl.seed_everything(5, verbose=False)
        callbacks = [retention(mu=5.0), AdapterCheckpoint(tmp_path / name, every_n_steps=4)]
        trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, max_steps=steps, max_epochs=-1)
        same = DataLoader([next(iter(loader(1)))] * 8, batch_size=None)  # Lightning does not know where it was in these
        trainer.fit(quick_module(), same, ckpt_path=tmp_path / name / "unedited.ckpt" if resume else None)
        saved: dict[str, Any] = torch.load(tmp_path / name / "last.ckpt", weights_only=True)
        return {part: saved[part] for part in ("state_dict", "optimizer_states")}

    whole = run("whole", 4)
    run("ended", 2)
    assert different(whole, run("ended", 4, resume=True)) == []


def test_a_finished_run_is_not_edited_again_and_one_that_goes_on_is(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory, tmp_path: Path
) -> None:
    def run(steps: int, resume: bool) -> Retention:
        found: Retention = retention(mu=5.0)
        callbacks = [found, AdapterCheckpoint(tmp_path / "checkpoints", every_n_steps=2)]
        trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, max_steps=steps, max_epochs=-1)
        trainer.fit(quick_module(), loader(8), ckpt_path=tmp_path / "checkpoints/last.ckpt" if resume else None)
        return found

    run(2, resume=False)
    first = columns(tmp_path / "checkpoints/last.ckpt")
    assert run(2, resume=True).unedited == {}
    assert all(torch.equal(value, first[name]) for name, value in columns(tmp_path / "checkpoints/last.ckpt").items())
    assert run(4, resume=True).report()["retention"]["edits"] == 2


def test_the_strength_is_the_largest_that_the_validation_rows_bear(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory
) -> None:
    """Measured, and what validation then says; a larger tolerance takes a larger μ, none at all takes none."""

    def run(tolerance: float) -> dict[str, Any]:
        module, found = quick_module(), retention(task_tolerance=tolerance)
        trainer = make_trainer(callbacks=[found], max_steps=8, max_epochs=-1, check_val_every_n_epoch=5)
        pl.seed_everything(5, verbose=False)
        trainer.fit(module, loader(8), loader(2))
        after = trainer.validate(module, loader(2), verbose=False)[0]["val/loss"]
        report: dict[str, Any] = found.report()["retention"]
        assert report["val_loss_after"] == pytest.approx(after, rel=1e-5)
        assert report["val_loss_after"] - report["val_loss_before"] <= tolerance
        return report

    small, large = run(1e-4), run(1e-2)
    assert 0 < small["mu"] < large["mu"]
    assert small["val_loss_before"] == pytest.approx(large["val_loss_before"], rel=1e-6)
    assert small["general_cost_after"] > large["general_cost_after"]


def test_other_checkpoints_stay_and_the_edited_adapter_gets_its_own(
    quick_module: Factory, loader: Factory, make_trainer: Factory, retention: Factory, tmp_path: Path
) -> None:
    module = quick_module()
    saver = ModelCheckpoint(tmp_path / "mine", save_last=True, every_n_train_steps=1)
    trainer = make_trainer(callbacks=[retention(mu=5.0), saver], enable_checkpointing=True, max_steps=2, max_epochs=-1)
    trainer.fit(module, loader(8))
    edited, unedited = columns(tmp_path / "mine/retained.ckpt"), columns(tmp_path / "mine/unedited.ckpt")
    for site in module.geometry.groups[0].sites:
        assert torch.equal(edited[site.name], site.up.weight.detach())
        assert not torch.equal(unedited[site.name], site.up.weight.detach())


@pytest.mark.parametrize(
    "settings", [{"fast_dev_run": 2}, {"max_steps": 2, "max_epochs": -1}], ids=["dev run", "no checkpoints"]
)
def test_a_run_that_writes_nothing_edits_all_the_same(
    quick_module: Factory,
    loader: Factory,
    make_trainer: Factory,
    retention: Factory,
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    files, module, found = set(tmp_path.iterdir()), quick_module(), retention(mu=5.0)
    make_trainer(callbacks=[found], **settings).fit(module, loader(8))
    for site in module.geometry.groups[0].sites:
        assert not torch.equal(found.unedited[site.name], site.up.weight.detach())
    assert set(tmp_path.iterdir()) <= files | {tmp_path / "general.txt"}
