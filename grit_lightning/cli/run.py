"""`grit fit|validate|test|predict`: a LightningCLI over any module, data and callbacks, with one folder per run.

Settings come from, in rising order: defaults, `--config` files in the order given, the model settings inside the
checkpoint of `--ckpt_path`, the other command-line options. A run writes into one folder, `--output`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionYesNo, Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from grit_lightning import callbacks, datamodules  # imported, so that YAML can use the short names of their classes
from grit_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint, left_by_this_slurm_job
from grit_lightning.callbacks.config_writer import ConfigWriter
from grit_lightning.callbacks.generation_writer import GenerationWriter
from grit_lightning.callbacks.progress import GeometryProgressBar, ProgressLines
from grit_lightning.callbacks.run_record import RunRecord
from grit_lightning.callbacks.step_timer import StepTimer
from grit_lightning.callbacks.stop_on_signal import StopOnSignal
from grit_lightning.checkpoints.atomic_io import make_atomic
from grit_lightning.checkpoints.reading import model_settings
from grit_lightning.cli.run_parser import ConfigByName, RunParser, with_names_left_out, with_nested_help
from grit_lightning.cli.run_words import DEFAULT_SEED, SUBCOMMANDS
from grit_lightning.errors import InvalidValueError, did_you_mean
from grit_lightning.module import GritLitModule
from grit_lightning.runs.folder import (
    CHECKPOINTS,
    CONFIG,
    clear,
    default_folder,
    require_free,
    resume_command,
    run_files,
    run_folder_of,
)
from grit_lightning.runs.metrics_log import JSONLinesLogger

__all__ = ["GritCLI", "callbacks", "datamodules"]


class GritCLI(LightningCLI):
    """LightningCLI with one run folder, shipped configurations and an evaluation before and after training.

    Args:
        words: Command-line words, the subcommand first.
    """

    def __init__(self, words: list[str]) -> None:
        """Parse, build and run. A run that fails before its work begins leaves nothing behind."""
        self.words = with_names_left_out(with_nested_help(words))
        self.folder = Path()
        self.config_writer: ConfigWriter | None = None
        self.files_before: set[Path] = set()
        try:
            super().__init__(
                model_class=GritLitModule,
                datamodule_class=LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,  # ConfigWriter: atomic, and in the run folder whatever the loggers are
                seed_everything_default=DEFAULT_SEED,
                auto_configure_optimizers=False,  # the module builds its optimizer, after configure_model
                load_from_checkpoint_support=False,  # the module saves plain hyperparameters of its own
                parser_class=RunParser,
                parser_kwargs={"prog": "grit", **{name: _about(name) for name in self.subcommands()}},
            )
        except BaseException:
            self._leave_nothing_half_written()
            raise

    def _leave_nothing_half_written(self) -> None:
        writer = self.config_writer
        if writer is None or writer.path is None or writer.training_began:
            return
        if not self._continues:
            rank_zero_only(clear)(self.folder)
        elif rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # set by Lightning
            for path in filter(Path.is_file, set(run_files(self.folder)) - self.files_before):
                path.unlink(missing_ok=True)  # TensorBoard opens a file when it is closed

    # Parsing.

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Add the subcommand that is run, and not the others: to make the parser of each takes a while."""
        name = self.words[0]
        self._subcommand_parsers = {name: self._prepare_subcommand_parser(Trainer, name, **kwargs.get(name, {}))}
        parser.add_subcommands().add_subcommand(name, self._subcommand_parsers[name])

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Build a parser whose `--config` knows the shipped configurations."""
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=ConfigByName, help="A YAML file, or the name of a shipped one.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run. Every subcommand takes all of them, so that one file serves all subcommands."""
        help_of = {
            "output": "Run folder. If not given: runs/<names of the configs>-seed<seed>.",
            "overwrite": "Replace the run that the output folder already holds.",
            "evaluate_before_fit": "fit: validate once before and once after training.",
            "without": "Class name of a callback to leave out, or a list of them; may be repeated. [] forgets those before.",
            "tokenizer": "Where the data module's tokenizer comes from, if not from the backbone.",
        }
        parser.add_argument("--output", type=str | None, default=None, help=help_of["output"])
        for flag in ("overwrite", "evaluate_before_fit"):
            parser.add_argument(f"--{flag}", action=ActionYesNo, nargs="?", default=False, help=help_of[flag])
        parser.add_argument("--without", type=list[str], default=[], help=help_of["without"])
        parser.add_argument("--tokenizer", type=str | None, default=None, help=help_of["tokenizer"])
        parser.set_defaults({"model": {"class_path": "grit_lightning.module.GritLitModule"}})
        parser.link_arguments(("model.init_args.backbone", "tokenizer", "data"), "data.init_args.tokenizer", _tokenizer)
        parser.link_arguments(("seed_everything", "data"), "data.init_args.seed", _data_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the words, with the model settings of a checkpoint between the configuration files and the options."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--ckpt_path")
        named = finder.parse_known_args(self.words)[0].ckpt_path
        self.config = parser.parse_args(self._with_checkpoint(named))
        in_a_file = self._settings.get("ckpt_path")
        if in_a_file != named:
            self.config = parser.parse_args(self._with_checkpoint(in_a_file))

    def _parse_ckpt_path(self) -> None:
        """Do nothing: `parse_arguments` has done it. Lightning's lets the checkpoint win over the command line."""

    def _with_checkpoint(self, checkpoint: str | None) -> list[str]:
        if not checkpoint or not Path(checkpoint).is_file():
            return self.words
        end = 1
        for position, word in enumerate(self.words):
            if word in self.subcommands():
                end = max(end, position + 1)
            elif word.partition("=")[0] in ("-c", "--config"):
                end = max(end, position + (1 if "=" in word else 2))
        saved = json.dumps({"init_args": model_settings(Path(checkpoint))})
        return [*self.words[:end], f"--model={saved}", *self.words[end:]]

    @property
    def _settings(self) -> Namespace:
        settings: Namespace = self.config[self.config.subcommand]
        return settings

    # Building.

    def before_instantiate_classes(self) -> None:
        """Settle the run folder, before anything is built.

        Raises:
            FileExistsError: The folder already holds a run that is neither continued nor to be overwritten.
            ValueError: `without` names a callback that is not there, or the data module has a seed of its own.
        """
        self._name_once()
        self.folder = self._choose_folder()
        if self.subcommand == "fit" and (left := left_by_this_slurm_job(self.folder / CHECKPOINTS)) is not None:
            self._settings.ckpt_path = str(left)
        self.files_before = set(run_files(self.folder))
        if not (self._settings.overwrite or self._continues or self._settings.trainer.fast_dev_run):
            require_free(self.folder)
        self.settings_as_yaml = self._parser(self.subcommand).dump(self._settings, "yaml", False)  # nulls too
        self._leave_out_what_is_unused()

    def instantiate_classes(self) -> None:
        """Build everything from the settings.

        Raises:
            ValueError: A class refuses its settings.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            if (refusal := _refusal_behind(error)) is None:
                raise
            raise InvalidValueError(str(refusal)) from error

    def after_instantiate_classes(self) -> None:
        """Clear what is to be overwritten, now that the new settings have proved to build."""
        if self._settings.overwrite and not (self._continues or self._settings.trainer.fast_dev_run):
            rank_zero_only(clear)(self.folder)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Point everything that writes at the run folder, and add what every run has."""
        given = self.config_init[self.subcommand].trainer
        own = _as_list(given.callbacks)

        def add(callback: Callback, unless: type[Any], wanted: bool = True) -> None:
            if wanted and not any(isinstance(other, unless) for other in own):
                own.append(callback)

        table: Literal["fit_end", "evaluation_end"] = (
            "evaluation_end" if self._settings.evaluate_before_fit else "fit_end"
        )
        add(RunRecord(str(self.folder), table), unless=RunRecord)
        add(GenerationWriter(str(self.folder)), unless=GenerationWriter)
        add(StopOnSignal(resume_command(self.folder)), unless=StopOnSignal)
        self.config_writer = ConfigWriter(None if given.fast_dev_run else self.folder / CONFIG, self.settings_as_yaml)
        own.append(self.config_writer)
        if not given.barebones:
            add(StepTimer(every_n_steps=None), unless=StepTimer)
            kwargs["logger"] = self._loggers(given.logger)
            checkpoints = AdapterCheckpoint(self.folder / CHECKPOINTS)
            wanted = given.enable_checkpointing is not False and not given.fast_dev_run
            add(checkpoints, unless=Checkpoint, wanted=wanted)
            progress = GeometryProgressBar() if sys.stdout.isatty() else ProgressLines()
            add(progress, unless=ProgressBar, wanted=given.enable_progress_bar is not False)
        try:
            trainer = super().instantiate_trainer(**kwargs, callbacks=own, default_root_dir=str(self.folder))
        except (TypeError, ValueError) as error:  # an unknown strategy, accelerator or precision
            raise InvalidValueError(f"trainer: {error}") from error
        make_atomic(trainer)
        return trainer

    def _loggers(self, given: Any) -> list[Logger]:
        """Return the configured loggers, else TensorBoard's, and that of metrics.jsonl; none for `logger: false`."""
        if given is False:
            return []
        own = TensorBoardLogger(self.folder, name="", version="", default_hp_metric=False)
        chosen = [own] if given is None or given is True else _as_list(given)
        return [*chosen, JSONLinesLogger(self.folder)]

    def _choose_folder(self) -> Path:
        if chosen := self._settings.output or self._settings.trainer.default_root_dir:
            return Path(chosen)
        checkpoint = self._settings.get("ckpt_path")
        if checkpoint and (folder := run_folder_of(Path(checkpoint))) is not None:
            return folder
        configs = [str(config) for config in self._settings.config or [] if config is not None]
        return default_folder(configs, self._settings.seed_everything, str(self.subcommand))

    @property
    def _continues(self) -> bool:
        """Whether this resumes, or evaluates, the run that the folder holds."""
        checkpoint = self._settings.get("ckpt_path")
        if not checkpoint:
            return False
        return not Path(checkpoint).exists() or Path(checkpoint).resolve().is_relative_to(self.folder.resolve())

    def _name_once(self) -> None:
        """Keep config.yaml from naming backbone and seed twice: a later `--model.backbone` must reach the tokenizer too."""
        data = self._settings.data.get("init_args", {})
        if data.get("tokenizer") not in (None, self._settings.tokenizer, self._settings.model.init_args.backbone):
            self._settings.tokenizer = data["tokenizer"]
        seed = self._settings.seed_everything
        if not isinstance(seed, bool) and data.get("seed", seed) != seed:
            raise InvalidValueError(
                f"data.seed: expected the seed of the run, {seed}, got {data['seed']}. Set seed_everything instead."
            )

    def _leave_out_what_is_unused(self) -> None:
        _forget_unused_loftq(self._settings.model.init_args.get("adapter"))
        configured = _as_list(self._settings.trainer.callbacks)
        names = [callback.class_path.rpartition(".")[2] for callback in configured]
        if unknown := sorted(set(self._settings.without) - set(names)):
            raise InvalidValueError(
                f"--without: expected names of configured callbacks, {names}, got {unknown}.{did_you_mean(unknown[0], names)}"
            )
        pairs = zip(configured, names, strict=True)
        self._settings.trainer.callbacks = [callback for callback, name in pairs if name not in self._settings.without]

    # Running.

    @property
    def _evaluates(self) -> bool:
        return bool(self._settings.evaluate_before_fit)

    def before_fit(self) -> None:
        """Measure the model as it is before training; a resumed run has done that."""
        if self._evaluates and not self._settings.ckpt_path:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    def after_fit(self) -> None:
        """Measure the trained model."""
        if self._evaluates:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _about(subcommand: str) -> dict[str, str]:
    """Return how the help of a subcommand begins; a usage in full would bury what follows it."""
    usage = f"grit {subcommand} [--config NAME ...] [options]"
    return {"usage": usage, "description": SUBCOMMANDS[subcommand]}


def _refusal_behind(error: BaseException) -> ValueError | None:
    """Return what a class said, in place of the account of everything else that the parser then tried; None if nothing did."""
    if not str(error).startswith(("Parser key", "Does not validate")):
        return None
    while error.__cause__ is not None:
        error = error.__cause__
    return error if isinstance(error, ValueError) else None


def _init_args(given: Any) -> Any:
    """Return the arguments of a class; none of one that is not chosen yet, while the help is being made."""
    return {} if given is None else given.get("init_args", {})


def _tokenizer(backbone: Any, tokenizer: str | None, data: Any) -> Any:
    return _init_args(data).get("tokenizer") or tokenizer or backbone


def _data_seed(seed: Any, data: Any) -> Any:
    own = _init_args(data).get("seed")
    return seed if own in (None, DEFAULT_SEED) and not isinstance(seed, bool) else own


def _forget_unused_loftq(adapter: Namespace | None) -> None:
    """Drop a LoftQ section that nobody wrote: parsing spells out its defaults, and PEFT warns when it is not used."""
    if adapter is not None and adapter.get("init_args") and adapter.init_args.get("init_lora_weights") != "loftq":
        adapter.init_args.pop("loftq_config", None)
