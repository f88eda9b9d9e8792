"""The parser of `grit fit|validate|test|predict`: Lightning's, with shipped configurations, nested help and plain errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch.cli import LightningArgumentParser

from grit_lightning.cli.parser_messages import explain
from grit_lightning.cli.run_words import GivenWords
from grit_lightning.cli.terminal import usage_error
from grit_lightning.configs import EXTENDS, find_config, with_extended

HELPED = {
    "data": "grit_lightning.datamodules.TaskDataModule",
    "model": "grit_lightning.module.GritLitModule",
    "model.adapter": "peft.LoraConfig",
    "model.optimizer": "grit_lightning.optimizers.EigenbasisAdam",
}
"""Classes whose help is shown where none is named."""
_NESTED_HELP = re.compile(r"--(model|data)(?:\.(.+))?\.help(=.*)?")
_MANY = 60  # names that are still worth a look


class RunParser(LightningArgumentParser):
    """Lightning's parser, whose errors are one sentence and whose options have no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what Lightning's parser takes, and add `--config`."""
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})  # `--trainer.max_step 5` would be max_steps

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say it in one sentence, with everything below it if errors are verbose, and exit with status 2."""
        if not self.exit_on_error:  # a parser inside another one, which reports what went wrong in it
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        options = {
            option: str(getattr(action, "_typehint", ""))
            for action in parser._actions
            for option in action.option_strings
        }
        explanation = explain(message, options, getattr(getattr(self, "parent_parser", self), "args", ()))
        command = f"grit {getattr(parser, 'subcommand', None) or 'fit'}"
        if explanation is None:  # in full, rather than a part that may not be the one that matters
            usage_error(message, more=f"`{command} --help` lists the options.")
        more = f"`{command} {explanation.help}` lists the settings."
        if explanation.known:
            more = f"Known: {', '.join(explanation.known[:_MANY])}{', …' if len(explanation.known) > _MANY else ''}."
        usage_error(explanation.sentence, more=more, everything=message)


class ConfigByName(ActionConfigFile):
    """`--config`: a path, or the name of a shipped configuration; what it extends is applied first."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Apply the files that the configuration extends, then itself; record itself alone."""
        try:
            *extended, path = with_extended(find_config(values))
        except (FileNotFoundError, ValueError) as error:
            parser.error(f"--config {error}")
        for file in (*extended, path):
            super().__call__(parser, cfg, str(file), option_string)  # type: ignore[no-untyped-call]
            cfg.pop(EXTENDS, None)
        del cfg[self.dest][-1 - len(extended) : -1]


def with_nested_help(words: Sequence[str]) -> list[str]:
    """Let `--model.geometry.help` work by itself: jsonargparse knows it behind `--model.help=CLASS` only.

    Args:
        words: Command-line words, the subcommand first.
    """
    for position, word in enumerate(words):
        nested = _NESTED_HELP.fullmatch(word)
        if nested is None:
            continue
        root, inner, value = nested.groups()
        given = GivenWords(words[1:])
        named = words[position + 1 : position + 2] if value is None else [value.removeprefix("=")]
        asked = [name for name in named if not name.startswith("-")]
        owner = _class_path(given.setting(root)) or HELPED[root]
        if inner is None:
            return [words[0], f"--{root}.help", *(asked or [owner])]
        known = given.setting(f"{root}.init_args.{inner}.class_path") or HELPED.get(f"{root}.{inner}")
        return [words[0], f"--{root}.help={owner}", f"--{root}.{inner}.help", *(asked or ([known] if known else []))]
    return list(words)


def _class_path(value: Any) -> str | None:
    return value.get("class_path") if isinstance(value, dict) else value


def with_names_left_out(words: Sequence[str]) -> list[str]:
    """Let every `--without` add to those before it, whether it holds one name or a list of them; `[]` forgets them."""
    found: list[str] = []
    rest = list(words)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if option == "--without" and not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        if option != "--without" or not value:
            found.append(f"{option}{equals}{value}")
        elif value.strip("[ ]"):
            found.append(f"--without+=[{value.strip('[ ]')}]")
        else:
            found.append("--without=[]")
    return found
