"""The parser of the subcommands that need no Trainer: argparse, with its errors as one sentence that suggests a name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from grit_lightning.cli.terminal import usage_error
from grit_lightning.errors import did_you_mean


class PlainParser(argparse.ArgumentParser):
    """An argument parser that takes options by their whole name only."""

    def __init__(self, prog: str, description: str) -> None:
        """Name the command and what it does."""
        super().__init__(prog, description=description, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Look for unknown options first: a misspelt one is a better explanation than the one that is missing without it."""
        known = self._option_string_actions
        for word in args or ():
            option = word.partition("=")[0]
            if option.startswith("--") and len(option) > 2 and option not in known:
                self.error(f"{option}: there is no such option.{did_you_mean(option, known)}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Suggest one of the choices."""
        if action.choices is not None and value not in action.choices:
            name = "/".join(action.option_strings) or str(action.dest)
            choices = [str(choice) for choice in action.choices]
            self.error(
                f"{name}: expected one of {', '.join(choices)}, got {value!r}.{did_you_mean(str(value), choices)}"
            )

    def error(self, message: str) -> NoReturn:
        """Say it in one sentence, and where all options are listed."""
        usage_error(message, more=f"`{self.prog} --help` lists the options.", everything=self.format_usage().rstrip())


class FitWordsParser(PlainParser):
    """The parser of a subcommand that takes the words of `grit fit`, and a few options of its own.

    Args:
        prog: The command.
        description: What it does.
    """

    def __init__(self, prog: str, description: str) -> None:
        """Say in the help where the other options are listed."""
        super().__init__(prog, description)
        self.usage = f"{prog} [--config NAME ...] [options of {prog} or of grit fit]"
        self.epilog = "All options of `grit fit` are taken too, and mean the same: `grit fit --help` lists them."

    def split(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return the values of this command's own options, and the words of `grit fit`."""
        own, rest = argparse.ArgumentParser.parse_known_args(self, list(words))
        return own, rest
