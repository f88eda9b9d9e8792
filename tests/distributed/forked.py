"""Programs in processes that have imported everything before they begin: importing it takes longer than what they do."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

CONTEXT = multiprocessing.get_context("forkserver")  # it imports once, computes nothing, and every process begins there
CONTEXT.set_forkserver_preload(["grit_lightning.cli.run"])


class Ended(NamedTuple):
    """How a program has ended: a negative code is that of the signal which has killed it."""

    code: int
    said: str


def run_program(*words: str, log: Path, environment: Mapping[str, str], patience: float) -> Ended:
    """Run `python WORDS`, a script or `-m MODULE`, with the imports done; raise `TimeoutError` if it hangs.

    Args:
        words: What would stand behind `python`.
        log: File for all that it writes.
        environment: All its variables.
        patience: Seconds after which it is killed.
    """
    log.write_text("", encoding="utf-8")
    with _environment(environment):  # of the process that imports, if this is the first program
        process = CONTEXT.Process(target=_run, args=(words, log, dict(environment)))
        process.start()
    process.join(patience)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{words} still ran after {patience} seconds:\n{log.read_text(encoding='utf-8')[-4000:]}")
    assert process.exitcode is not None
    return Ended(process.exitcode, log.read_text(encoding="utf-8"))


def _run(words: tuple[str, ...], log: Path, environment: Mapping[str, str]) -> None:
    with log.open("w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
