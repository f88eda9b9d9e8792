"""Which checkpoint and which run the words of `grit fit|validate|test|predict` mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grit_lightning.cli.run_words import named_checkpoint, settle
from grit_lightning.errors import InvalidValueError, MissingFileError


@pytest.fixture
def run() -> Path:
    """A run folder `runs/a`, as it looks after a training that used the demo's data."""
    return make_run(Path("runs/a"))


def make_run(folder: Path) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    content = {"data": {"class_path": "BoolQDataModule"}, "output": str(folder), "seed_everything": 3}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder


LAST = "runs/a/checkpoints/last.ckpt"


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_the_run_of_a_checkpoint_says_the_settings(stage: str) -> None:
    folder = str(Path("runs/a").resolve())
    own = [f"--config={folder}/config.yaml", f"--output={folder}"]
    assert settle(stage, ["--ckpt_path", LAST]) == [*own, "--ckpt_path", LAST]
    Path("small.yaml").write_text("data: {init_args: {batch_size: 2}}")
    more = ["--config=strategy/ddp", "--config=small.yaml", "--data.seed=2", f"--ckpt_path={LAST}"]  # none chooses data
    assert settle(stage, more) == [*own, *more]


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    "named", [["--config=demo"], ["--config=boolq", "--config=strategy/ddp"], ["--data=QNLIDataModule"]]
)
def test_settings_that_name_data_stay_as_they_are(named: list[str]) -> None:
    words = [*named, f"--ckpt_path={LAST}"]
    assert settle("test", words) == words


@pytest.mark.usefixtures("run")
def test_a_moved_run_is_evaluated_where_it_is() -> None:
    Path("runs").rename("elsewhere")
    found = settle("test", ["--ckpt_path=elsewhere/a/checkpoints/last.ckpt"])
    assert found[:2] == [
        f"--config={Path('elsewhere/a').resolve()}/config.yaml",
        f"--output={Path('elsewhere/a').resolve()}",
    ]


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["--output", "runs/a"], "runs/a"),
        (["--config=runs/a/config.yaml"], "runs/a"),
        (["--config=moved/config.yaml"], "moved"),  # where the file lies, not what it says
        (["--config=demo", "--output=runs/a"], "runs/a"),
        (["--config=demo"], "runs/demo-seed42"),  # where `fit` with the same words has put it
        (["--config=demo", "--config=ablations/no_kfac", "--seed_everything=7"], "runs/demo+no_kfac-seed7"),
        (["--config=named.yaml"], "my/run"),
        (["--config=demo", "--trainer.default_root_dir=my/run"], "my/run"),
    ],
)
def test_last_is_the_last_checkpoint_of_the_run_that_the_words_name(words: list[str], folder: str) -> None:
    for name in ("runs/a", "runs/demo-seed42", "runs/demo+no_kfac-seed7", "my/run"):
        make_run(Path(name))
    make_run(Path("runs/b")).rename("moved")
    Path("named.yaml").write_text("extends: demo\noutput: my/run\n")
    for stage in ("fit", "test"):
        assert settle(stage, [*words, "--ckpt_path=last"])[-1] == f"--ckpt_path={folder}/checkpoints/last.ckpt"
    Path("last.yaml").write_text("ckpt_path: last\n")
    assert settle("test", [*words, "--config=last.yaml", f"--output={folder}"])[-1].startswith(f"--ckpt_path={folder}/")


@pytest.mark.usefixtures("run")
def test_export_finds_the_last_checkpoint_too() -> None:
    assert named_checkpoint("last", ["runs/a/config.yaml"]) == LAST
    assert named_checkpoint(LAST, []) == LAST


@pytest.mark.parametrize("words", [["--config=demo"], ["--output=runs/b"], ["--config=demo", "--output=runs/b"]])
def test_a_run_without_a_last_checkpoint_is_one_sentence(words: list[str]) -> None:
    Path("runs/b").mkdir(parents=True)
    with pytest.raises(MissingFileError, match=r"--ckpt_path last: expected runs/.*/last.ckpt, got no such file\."):
        settle("test", [*words, "--ckpt_path", "last"])


def test_null_is_no_checkpoint() -> None:
    Path("resumed.yaml").write_text("extends: demo\nckpt_path: gone.ckpt\n")
    words = ["--config=resumed.yaml", "--ckpt_path=null"]
    assert settle("fit", words) == words


def test_a_checkpoint_outside_a_run_needs_data() -> None:
    Path("x.ckpt").touch()
    with pytest.raises(
        InvalidValueError, match=r"no data: add --config or --data, since the checkpoint lies in no run folder"
    ):
        settle("test", ["--ckpt_path=x.ckpt"])


@pytest.mark.parametrize("word", ["--help", "-h", "--data.help", "--model.geometry.help", "--print_config"])
def test_help_needs_no_data(word: str) -> None:
    assert settle("fit", [word]) == [word]
