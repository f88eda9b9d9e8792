"""The full parser's words and errors: options by their whole name, nested help, what is left out, and one sentence an error.

The sentences are taken from the program itself, since what they are made from is jsonargparse's.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from grit_lightning import GeometryConfig
from grit_lightning.cli.program import main
from grit_lightning.cli.run_parser import with_names_left_out

Grit = Callable[..., None]

WRONG = {
    # options
    "--trainer.max_step=5": "--trainer.max_step: there is no such option. Did you mean `--trainer.max_steps`?",
    "--overwrit": "--overwrit: there is no such option. Did you mean `--overwrite`?",
    "--modell.backbone=x": "--modell.backbone: there is no such option. Did you mean `--model.backbone`?",
    "extra": "extra: expected an option such as --config, got a word that belongs to none.",
    "--trainer.max_steps": "--trainer.max_steps: expected a value, got none.",
    "--without": "--without: expected a value, got none.",
    "--model.optimizer.lr": "--model.optimizer.lr: expected a value, got none.",
    # settings of classes
    "--model.trim_logit=true": "model.trim_logit: GritLitModule has no such setting. Did you mean `model.trim_logits`?",
    "--model.geometry.kfac_dampin=1": "GeometryConfig has no such setting. Did you mean `model.geometry.kfac_damping`?",
    "--model.adapter.lora_alph=1": "LoraConfig has no such setting. Did you mean `model.adapter.lora_alpha`?",
    "--data.max_lengh=5": "IMDbDataModule has no such setting. Did you mean `data.max_length`?",
    "--trainer.callbacks.every_n_stps=5": "SpectraLogger has no such setting. Did you mean `trainer.callbacks.every_n_steps`?",
    "--config=setting.yaml": "trainer.callbacks.every_n_step: Reprojection has no such setting.",
    # classes
    "--trainer.callbacks=Reprojecton": "a list of them, got 'Reprojecton'. Did you mean `Reprojection`?",
    "--trainer.callbacks+=ModelChekpoint": "got 'ModelChekpoint'. Did you mean `ModelCheckpoint`?",
    "--config=callback.yaml": "a list of them, got 'Reprojecton'. Did you mean `Reprojection`?",
    "--data=GSM8K": "derived from LightningDataModule, got 'GSM8K'. Did you mean `GSM8KDataModule`?",
    "--data=mine.csv": "got the file 'mine.csv'. Rows in a file go to --data.source.",
    "--model.optimizer=AdamWW": "derived from Optimizer, got 'AdamWW'. Did you mean `AdamW`?",
    "--model.adapter=LoraConfg": "derived from PeftConfig, got 'LoraConfg'. Did you mean `LoraConfig`?",
    "--model.adapter=peft.LoraConfg": "got 'peft.LoraConfg': peft has no LoraConfg. Did you mean `LoraConfig`?",
    "--trainer.logger=Tensorboard": "or true or false, got 'Tensorboard'. Did you mean `TensorBoardLogger`?",
    "--data=nowhere.Data": "got 'nowhere.Data': there is no module 'nowhere' in ",
    "--data=peft.LoraConfig": "got 'peft.LoraConfig', which is not derived from LightningDataModule.",
    "--trainer.callbacks.help=Reprojecton": "got 'Reprojecton'. Did you mean `Reprojection`?",
    # values
    "--trainer.max_steps=many": "trainer.max_steps: expected an integer, got 'many'.",
    "--seed_everything=x": "seed_everything: expected true or false, or an integer, got 'x'.",
    "--model.optimizer.lr=fast": "model.optimizer.lr: expected a number, got 'fast'.",
    "--model.lr_scheduler=cosin": "or cosine, got 'cosin'. Did you mean `cosine`?",
    "--model.quantization=nf5": "model.quantization: expected nf4, or null, got 'nf5'.",
    "--model.geometry.pairing=swap": "model.geometry.pairing: expected kfac, or swapped, got 'swap'. Did you mean `swapped`?",
    "--data.columns=5": "data.columns: expected settings by name, or null, got '5'.",
}


@pytest.mark.parametrize("word", WRONG)
def test_an_error_of_the_parser_is_one_sentence(grit: Grit, capsys: pytest.CaptureFixture[str], word: str) -> None:
    Path("callback.yaml").write_text("trainer: {callbacks: [{class_path: Reprojecton}]}")
    Path("setting.yaml").write_text("trainer: {callbacks: [{class_path: Reprojection, init_args: {every_n_step: 4}}]}")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config=demo", word])
    assert stopped.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("grit: error: ")
    assert WRONG[word] in first
    assert second.startswith(("Known: ", "`grit fit --"))


@pytest.mark.parametrize("verbose", [["--verbose-errors"], []])
def test_all_that_the_parser_says_is_behind_a_switch(capsys: pytest.CaptureFixture[str], verbose: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *verbose, "--config=demo", "--data=GSM8K"])
    first, *more = capsys.readouterr().err.splitlines()
    assert first.endswith("Did you mean `GSM8KDataModule`?")
    assert ("Given value: GSM8K" in "\n".join(more)) == bool(verbose)


def test_a_model_that_nothing_describes_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--data=BoolQDataModule"])
    assert "--model.backbone, --model.adapter: expected a value, got none." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--model.adapter.task_type=CAUSAL", "Invalid task type: 'CAUSAL'."),  # PEFT's, at the end of a long chain
        ("--trainer.strategy=dpd", "trainer: You selected an invalid strategy name"),
        ("--trainer.accelerator=gppu", "trainer: You selected an invalid accelerator name"),
        ("--trainer.devices=many", "trainer: `devices` selected with `CPUAccelerator` should be"),
    ],
)
def test_what_a_class_refuses_is_one_sentence(
    grit: Grit, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        grit("fit", "--output=a", word)
    assert stopped.value.code == 1
    assert f"grit: error: {message}" in capsys.readouterr().err
    assert not Path("a").exists()


# A class of one's own.


def test_a_module_in_the_working_folder_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    Path("my_own_task.py").write_text(
        "from grit_lightning.datamodules import BoolQDataModule, TaskDataModule\n"
        "class MyData(BoolQDataModule):\n    pass\n"
        "class Unfinished(TaskDataModule):\n    pass\n"
    )
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config=demo", "--data=my_own_task.MyData", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["class_path"] == "my_own_task.MyData"
    with pytest.raises(SystemExit, match="1"):
        main(["fit", "--config=demo", "--data=my_own_task.Unfinished"])
    assert "Unfinished: expected a subclass of TaskDataModule with the attribute `schema`" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config=demo", "--data=my_own_task.MyDat"])
    assert "my_own_task has no MyDat. Did you mean `MyData`?" in capsys.readouterr().err
    assert sys.path[-1] == str(Path.cwd())  # last, so that nothing that is installed is hidden


# Help.


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *words])
    return capsys.readouterr().out


def test_every_knob_of_the_geometry_has_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    shown = helped(capsys, "--model.geometry.help").partition("Help for ")[2].replace("\n" + 24 * " ", " ")
    for knob in dataclasses.fields(GeometryConfig):
        (line,) = [line for line in shown.splitlines() if line.lstrip().startswith(f"--model.geometry.{knob.name} ")]
        assert len(line.partition("(type: ")[0].split()) > 6, line


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--model.help",), "--model.backbone"),
        (("--model.adapter.help",), "--model.adapter.lora_alpha"),
        (("--config=demo", "--model.adapter.help"), "--model.adapter.lora_alpha"),
        (("--model.adapter.help", "IA3Config"), "--model.adapter.feedforward_modules"),
        (("--model.adapter.help=IA3Config", "--config=demo"), "--model.adapter.feedforward_modules"),
        (("--config=demo", "--model.optimizer.help"), "--model.optimizer.amsgrad"),  # the demo's is AdamW
        (("--model.optimizer.help",), "--model.optimizer.weight_decay"),
        (("--model.generation.help",), "--model.generation.max_new_tokens"),
        (("--data.help",), "--data.max_length"),
        (("--config=demo", "--data.help"), "--data.max_length"),
        (("--data.help", "MixtureDataModule"), "--data.tasks"),
        (("--trainer.callbacks.help", "Reprojection"), "--trainer.callbacks.every_n_steps"),
    ],
)
def test_nested_help_works_by_itself(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], option: str) -> None:
    assert f"\n  {option} " in helped(capsys, *words) or f"\n  {option}," in helped(capsys, *words)


# What is left out.


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--without", "A"], ["--without+=[A]"]),
        (["--without=A"], ["--without+=[A]"]),
        (["--without", "A", "--without=B"], ["--without+=[A]", "--without+=[B]"]),
        (["--without=A,B"], ["--without+=[A,B]"]),
        (["--without", "[A, B]"], ["--without+=[A, B]"]),
        (["--without", "--config=demo"], ["--without", "--config=demo"]),  # its value is missing, as the parser says
        (["--without=[]", "--x"], ["--without=[]", "--x"]),
    ],
)
def test_one_name_or_several_are_left_out(words: list[str], found: list[str]) -> None:
    assert with_names_left_out(["fit", *words]) == ["fit", *found]


def test_names_left_out_add_up_over_files_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config=demo", "--config=ablations/fixed_rank", "--without", "Reprojection", "--without=[SpectraLogger]"]
    assert yaml.safe_load(helped(capsys, *words, "--print_config"))["without"] == [
        "RankAdaptation",
        "Reprojection",
        "SpectraLogger",
    ]


def test_a_misspelt_name_to_leave_out_is_refused(grit: Grit, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        grit("fit", "--output=a", "--without", "Reprojecton")
    assert "got ['Reprojecton']. Did you mean `Reprojection`?" in capsys.readouterr().err
