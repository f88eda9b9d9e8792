"""What a signal does to a run of the program: its exit code, what it leaves, and the command that goes on."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grit_lightning.checkpoints.reading import read_checkpoint
from grit_lightning.cli.program import main

Grit = Callable[..., None]
LAST = Path("a/checkpoints/last.ckpt")


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], str]:
    """`signalled(step, signum)`: the option with which a run sends itself a signal in that step."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "distributed")

    def option(step: int, signum: int) -> str:
        settings = {"class_path": "dies.SignalledAt", "init_args": {"rank": 0, "step": step, "signum": signum}}
        return f"--trainer.callbacks+={json.dumps(settings)}"

    return option


def handlers() -> dict[int, Any]:
    return {
        signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    }


def stopped(grit: Grit, *words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        grit("fit", *words)
    return int(ended.value.code)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_a_checkpoint_the_usual_code_and_the_command_that_goes_on(
    grit: Grit, signalled: Any, capfd: pytest.CaptureFixture[str], name: str, code: int
) -> None:
    before = handlers()
    assert stopped(grit, "--output=a", signalled(2, getattr(signal, name))) == code
    assert handlers() == before
    assert read_checkpoint(LAST)["global_step"] == 2
    summary = json.loads(Path("a/summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("interrupted", f"StoppedBySignal: {name}")
    said = capfd.readouterr().err
    assert f"Stopped by {name} after optimizer step 2. It is saved in {LAST}." in said
    assert "Traceback" not in said
    if name != "SIGTERM":
        return  # one of them goes on, for all
    command = shlex.split(next(line for line in said.splitlines() if line.startswith("  grit fit ")))
    main(command[1:])
    assert read_checkpoint(LAST)["global_step"] == 4
    assert json.loads(Path("a/summary.json").read_text())["status"] == "finished"


def test_a_requeued_slurm_job_goes_on_where_its_signal_stopped_it(
    grit: Grit, signalled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nkill -TERM $PPID\n')  # as SLURM then does
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=":")
    job = {"NTASKS": 1, "NTASKS_PER_NODE": 1, "JOB_ID": 17, "JOB_NAME": "x", "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    words = ("--output=a", "--overwrite", signalled(2, signal.SIGUSR1))
    assert stopped(grit, *words) == 128 + signal.SIGUSR1
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert "SLURM job 17 has been requeued" in capfd.readouterr().err
    assert read_checkpoint(LAST)["global_step"] == 2
    assert not list(tmp_path.rglob("hpc_ckpt*"))

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    grit("fit", *words)  # the same command
    assert read_checkpoint(LAST)["global_step"] == 4
    steps = [
        json.loads(line)["step"] for line in Path("a/metrics.jsonl").read_text().splitlines() if "train/loss" in line
    ]
    assert steps == [0, 1, 2, 3]
