"""The program: one folder a run, nothing lost or half-written, settings named once, errors as one line."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ProgressBar
from peft import IA3Config, LoraConfig

from grit_lightning import GritLitModule
from grit_lightning.callbacks import GeometryProgressBar, ProgressLines, StepTimer
from grit_lightning.cli.program import main
from grit_lightning.cli.run import GritCLI

Grit = Callable[..., None]
ROOT = Path(__file__).resolve().parents[2]
RESUMED_MID_EPOCH = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
COPIED = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # `trained` is a copy
FOLDER_REUSED = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    weights: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return weights


def same_weights(first: Path, second: Path) -> bool:
    one, other = adapter_weights(first), adapter_weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def settings(grit: Grit, capsys: pytest.CaptureFixture[str], subcommand: str, *words: str) -> dict[str, Any]:
    """What the program would run with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        grit(subcommand, *words, "--print_config")
    assert stopped.value.code == 0
    parsed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return parsed


def build_only(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> GritCLI:
    """Everything but the run itself."""
    monkeypatch.setattr(GritCLI, "_run_subcommand", lambda self, subcommand: None)
    return GritCLI(words)


# Settings of several tests each: everything is built once, and nothing is run.
IN_A_TERMINAL = ("fit", "--trainer.enable_progress_bar=true")
CONFIGURED = (
    *("fit", "--config=ablations/no_kfac", "--seed_everything=7"),
    *("--trainer.callbacks+=StepTimer", "--trainer.enable_progress_bar=true"),
)
ELSEWHERE = ("fit", "--trainer.default_root_dir=elsewhere", "--tokenizer=other")
ANOTHER_RUN = ("test", "--data.tokenizer=other")
Built = Callable[..., GritCLI]


@pytest.fixture(scope="module")
def built(tiny: list[str]) -> Built:
    """`built("fit", "--seed_everything=7")`: the demo on the tiny model, up to its run; once for the same words."""

    @functools.cache
    def build(subcommand: str, *words: str, terminal: bool = False) -> GritCLI:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: terminal)
            made = build_only(patch, [subcommand, "--config=demo", *tiny, *words])
        assert [path for path in Path().iterdir() if path.name != "cache"] == []  # no folder before it is needed
        return made

    return build


# One run, one folder.


@pytest.fixture(scope="module")
def whole(grit: Grit, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run, alone in a working folder of its own, and what the run has printed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        words = ("--model.optimizer.lr=0.01", "--model.adapter.lora_dropout=0.1", "--trainer.callbacks+=SpectraLogger")
        grit("fit", "--output=runs/a", *words)
        return Path("runs/a").absolute(), shown.getvalue()


def test_a_run_writes_everything_into_its_folder(whole: tuple[Path, str]) -> None:
    folder, shown = whole
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert {path.name for path in folder.parents[1].iterdir()} <= {"runs", "cache"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    metrics = summary["metrics"]
    assert {"val/accuracy", "val/loss"} <= set(metrics["before"]) & set(metrics["after"])
    assert set(metrics["before"]) - set(metrics["majority"]) == {"val/loss"}
    scores = [f"{metrics[column]['val/f1']:.4f}" for column in ("before", "after", "majority")]
    assert re.search(r"before .* after .* always “negative”", shown)
    assert re.search("val/f1 .* " + " .* ".join(scores), shown)


def test_config_yaml_repeats_the_run_bit_for_bit(whole: tuple[Path, str]) -> None:
    one = whole[0]
    main(["fit", f"--config={one / 'config.yaml'}", "--output=b"])
    assert same_weights(one, Path("b"))
    first, second = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (one, Path("b")))
    assert first | {"output": "b"} == second
    assert first["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01


def test_evaluating_before_training_does_not_change_the_training(whole: tuple[Path, str]) -> None:
    one, other = whole[0], Path("b")
    main(["fit", f"--config={one / 'config.yaml'}", "--output=b", "--evaluate_before_fit=false"])
    before = [json.loads((folder / "summary.json").read_text())["metrics"]["before"] for folder in (one, other)]
    assert before[0]
    assert not before[1]
    assert same_weights(one, other)


@pytest.mark.parametrize(("words", "every"), [(ANOTHER_RUN, None), (CONFIGURED, 50)], ids=["added", "configured"])
def test_every_run_is_timed_by_one_timer(built: Built, words: tuple[str, ...], every: int | None) -> None:
    (timer,) = (callback for callback in built(*words).trainer.callbacks if isinstance(callback, StepTimer))
    assert timer.every_n_steps == every  # one that nobody has configured logs nothing


@pytest.mark.parametrize(("words", "kind"), [(IN_A_TERMINAL, GeometryProgressBar), (CONFIGURED, ProgressLines)])
def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(
    built: Built, words: tuple[str, ...], kind: type[ProgressBar]
) -> None:
    callbacks = built(*words, terminal=words == IN_A_TERMINAL).trainer.callbacks
    assert [type(callback) for callback in callbacks if isinstance(callback, ProgressBar)] == [kind]


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (IN_A_TERMINAL, "runs/demo-seed42"),
        (CONFIGURED, "runs/demo+no_kfac-seed7"),
        (ELSEWHERE, "elsewhere"),
        (ANOTHER_RUN, "runs/demo-seed42-test"),
    ],
)
def test_the_folder_is_named_after_configs_and_seed(built: Built, words: tuple[str, ...], folder: str) -> None:
    run = built(*words, terminal=words == IN_A_TERMINAL)
    assert run.folder == Path(folder)
    assert Path(run.trainer.default_root_dir) == Path(folder)


@pytest.mark.usefixtures("trained")
def test_a_taken_folder_is_refused_and_left_alone(grit: Grit, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents("a")
    with pytest.raises(SystemExit) as stopped:
        grit("fit", "--output=a")
    assert stopped.value.code == 1
    assert "a, which already holds one (" in capsys.readouterr().err
    assert contents("a") == before


@pytest.mark.usefixtures("trained")
def test_overwriting_removes_the_run_and_nothing_else(grit: Grit) -> None:
    Path("a/notes.txt").write_text("mine")
    first_events = {path.name for path in Path("a").glob("events*")}
    grit("fit", "--output=a", "--overwrite", "--trainer.max_steps=3")
    assert Path("a/notes.txt").read_text() == "mine"
    assert not first_events & {path.name for path in Path("a").glob("events*")}
    assert [path.name for path in Path("a/checkpoints").glob("epoch*")] == ["epoch=0-step=3.ckpt"]


@COPIED
@FOLDER_REUSED
@RESUMED_MID_EPOCH
@pytest.mark.usefixtures("trained")
def test_a_checkpoint_resumes_into_its_own_folder(grit: Grit) -> None:
    before = json.loads(Path("a/summary.json").read_text())
    grit("fit", "--ckpt_path=a/checkpoints/last.ckpt", "--trainer.max_steps=6")
    after = json.loads(Path("a/summary.json").read_text())
    assert (before["global_step"], after["global_step"]) == (4, 6)
    assert after["metrics"]["before"] == before["metrics"]["before"]
    assert not Path("runs").exists()


def test_resuming_into_another_runs_folder_is_refused(
    grit: Grit, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, "b")
    with pytest.raises(SystemExit):
        grit("fit", "--output=b", "--ckpt_path=a/checkpoints/last.ckpt", "--trainer.max_steps=6")
    assert "b, which already holds one (" in capsys.readouterr().err


@COPIED
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # evaluation needs no callbacks
@pytest.mark.usefixtures("trained")
def test_testing_a_checkpoint_adds_to_its_run(boolq_dir: Path) -> None:
    config = Path("a/config.yaml").read_text()
    data = ["--data=BoolQDataModule", f"--data.source={boolq_dir}", "--data.max_length=128"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    main(["test", *data, *quiet, "--ckpt_path=a/checkpoints/last.ckpt"])
    summary = json.loads(Path("a/summary.json").read_text())
    assert {"val/accuracy", "test/accuracy"} <= set(summary["metrics"]["after"])
    assert summary["status"] == "finished"
    assert Path("a/config.yaml").read_text() == config


@COPIED
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    "words", [["--ckpt_path=a/checkpoints/last.ckpt"], ["--ckpt_path=last", "--output=a"]], ids=["path", "last"]
)
def test_a_checkpoint_alone_is_tested_with_the_settings_of_its_run(words: list[str]) -> None:
    main(["test", *words])
    summary = json.loads(Path("a/summary.json").read_text())
    metrics, scores = summary["metrics"], {"val/accuracy", "val/macro_f1", "test/accuracy", "test/macro_f1"}
    assert scores <= set(metrics["after"])
    assert summary["majority_class"] == {"": "negative"}  # half of the rows are: of equally frequent ones the first
    assert {name: metrics["majority"][name] for name in scores} == pytest.approx(
        {name: 1 / 2 if "accuracy" in name else 1 / 3 for name in scores}
    )
    assert {path.name for path in Path().iterdir()} <= {"a", "cache"}  # not where config.yaml says it was trained


BAREBONES = ("barebones=true", "callbacks=null", "log_every_n_steps=null", "num_sanity_val_steps=null")


@pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)` but `Trainer\\(barebones=True\\)` is configured")
@pytest.mark.parametrize("options", [("logger=false",), BAREBONES])
def test_a_run_without_loggers_trains(grit: Grit, options: tuple[str, ...]) -> None:
    grit("fit", "--output=a", *(f"--trainer.{option}" for option in options))
    assert not list(Path("a").glob("events*"))
    assert not Path("a/metrics.jsonl").exists()


# Settings.


def test_the_printed_config_is_read_back_as_it_is(grit: Grit, capsys: pytest.CaptureFixture[str]) -> None:
    first = settings(grit, capsys, "fit", "--tokenizer=elsewhere")
    Path("printed.yaml").write_text(yaml.safe_dump(first))
    with pytest.raises(SystemExit):
        main(["fit", "--config=printed.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == first


def test_overlays_append_and_leave_out_callbacks(
    grit: Grit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: list[str]
) -> None:
    Path("more.yaml").write_text("without: [SpectraLogger]\ntrainer:\n  callbacks+:\n    - class_path: StepTimer\n")
    words = ("--config=more.yaml", "--config=ablations/no_reprojection", "--config=ablations/fixed_rank")
    parsed = settings(grit, capsys, "fit", *words)
    names = [callback["class_path"].rpartition(".")[2] for callback in parsed["trainer"]["callbacks"]]
    assert names == ["Reprojection", "RankAdaptation", "SpectraLogger", "StepTimer"]
    assert parsed["without"] == ["SpectraLogger", "Reprojection", "RankAdaptation"]
    built = build_only(monkeypatch, ["fit", "--config=demo", *words, *tiny])
    kept = {type(callback).__name__ for callback in built.trainer.callbacks}
    assert "StepTimer" in kept
    assert not {"SpectraLogger", "Reprojection", "RankAdaptation"} & kept


def test_backbone_and_seed_are_named_once(built: Built, tiny_backbone_dir: Path) -> None:
    run = built(*CONFIGURED)
    assert run.datamodule._tokenizer == run.model.hparams["backbone"] == str(tiny_backbone_dir)
    assert run.datamodule.seed == 7


@pytest.mark.parametrize("words", [ELSEWHERE, ANOTHER_RUN], ids=["--tokenizer", "--data.tokenizer"])
def test_the_tokenizer_can_be_another(built: Built, words: tuple[str, ...]) -> None:
    run = built(*words)
    assert run.datamodule._tokenizer == "other"
    assert yaml.safe_load(run.settings_as_yaml)["tokenizer"] == "other"


@pytest.mark.usefixtures("trained")
def test_a_checkpoint_wins_over_files_and_loses_to_options(grit: Grit, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = "--ckpt_path=a/checkpoints/last.ckpt"
    from_file = settings(grit, capsys, "test", checkpoint)["model"]["init_args"]["adapter"]["init_args"]
    assert (from_file["r"], from_file["lora_alpha"]) == (5, 7)
    option = settings(grit, capsys, "test", checkpoint, "--model.adapter.r=3")["model"]["init_args"]
    assert (option["adapter"]["init_args"]["r"], option["adapter"]["init_args"]["lora_alpha"]) == (3, 7)


@pytest.mark.usefixtures("trained")
def test_a_checkpoint_may_be_named_in_a_file(monkeypatch: pytest.MonkeyPatch, tiny: list[str]) -> None:
    Path("more.yaml").write_text("ckpt_path: a/checkpoints/last.ckpt\n")
    built = build_only(monkeypatch, ["test", "--config=demo", "--config=more.yaml", *tiny])
    assert built.model.hparams["adapter"]["r"] == 5


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("--model.adapter.use_rslora=true",), LoraConfig),
        (("--model.adapter=peft.IA3Config", "--model.adapter.feedforward_modules=[down_proj]"), IA3Config),
    ],
)
def test_any_peft_config_trains(
    grit: Grit, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], kind: type[Any]
) -> None:
    seen: list[Any] = []
    original = GritLitModule.configure_model

    def spy(self: GritLitModule) -> None:
        seen.append(self.adapter_config)
        original(self)

    monkeypatch.setattr(GritLitModule, "configure_model", spy)
    Path("ia3.yaml").write_text("model:\n  init_args:\n    geometry: null\ntrainer:\n  callbacks: null\n")
    if kind is IA3Config:
        words = ("--config=ia3.yaml", "--model.adapter.target_modules=[k_proj, v_proj, down_proj]", *words)
    grit("fit", *words, "--trainer.fast_dev_run=true")
    assert {type(config) for config in seen} == {kind}


# Errors.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.backbone=nowhere/at/all",), "nowhere/at/all"),
        (("--model.adapter.target_modules=[no_such_layer]",), "no_such_layer"),
        (("--model.adapter.r=0",), "positive rank, got 0"),
        (("--model.geometry.kfac_damping=-1",), "kfac_damping: expected"),
        (("--trainer.callbacks=[{class_path: RankAdaptation, init_args: {threshold: 1.5}}]",), "(0, 1], got 1.5"),
        (("--trainer.callbacks=[{class_path: Reprojection, init_args: {k: 17}}]",), "adapter's rank 16, got 17"),
        (("--model.geometry=null",), "Reprojection: expected a module with a rank-space geometry"),
        (("--data.max_length=129",), "129"),
        (("--data.source=nowhere",), "got 'nowhere', which does not exist"),
        (("--data.columns={text: missing}",), "missing"),
        (("--without=[Nonesuch]",), "callbacks, ['Reprojection', 'RankAdaptation', 'SpectraLogger'], got ['Nonesuch']"),
        (("--ckpt_path=nowhere.ckpt",), "--ckpt_path: expected a checkpoint, got nowhere.ckpt, which does not exist"),
        (("--data.seed=3",), "data.seed: expected the seed of the run, 42, got 3. Set seed_everything"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    grit: Grit, capfd: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        grit("fit", "--output=a", *words)
    assert stopped.value.code == 1
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("grit: error: ") and message in line]
    assert not [line for line in lines if line.startswith("Traceback")]
    assert not Path("a").exists()


def test_verbose_errors_show_the_traceback_behind_the_sentence(grit: Grit, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="positive rank"):
        grit("fit", "--output=a", "--model.adapter.r=0", "--verbose-errors")
    assert capfd.readouterr().err.splitlines()[-1] == "grit: error: adapter.r: expected a positive rank, got 0."
    assert not Path("a").exists()


def test_an_unknown_config_lists_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config=nosuch"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("grit: error: --config nosuch: expected a file or the name of a shipped")
    assert ", demo, " in error
    assert len(error.splitlines()) == 1


def test_a_file_that_is_no_checkpoint_is_named(grit: Grit, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(SystemExit) as stopped:
        grit("test", "--ckpt_path=broken.ckpt")
    assert stopped.value.code == 1
    assert "expected a checkpoint that can be read, got broken.ckpt" in capsys.readouterr().err


def test_a_crash_in_training_keeps_its_traceback_and_its_record(grit: Grit, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise ValueError("a defect, not a mistake of the user")

    monkeypatch.setattr(GritLitModule, "training_step", crash)
    with pytest.raises(ValueError, match="a defect"):
        grit("fit", "--output=a")
    summary = json.loads(Path("a/summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", "ValueError: a defect, not a mistake of the user")
    assert Path("a/config.yaml").is_file()


# The script.


def test_train_py_is_the_same_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config=demo", "--model.optimizer.lr=0.5", "--print_config"]
    with pytest.raises(SystemExit):
        main(words)
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert capsys.readouterr().out == expected
    assert len((ROOT / "train.py").read_text().splitlines()) <= 15
