"""A process that dies ends the run, and the run goes on from its last checkpoint: both launchers, real signals."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from grit_lightning.checkpoints.reading import read_checkpoint
from grit_lightning.cli.program import main

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 480  # seconds; a hang would last for the timeout of the process group, 900
OVERLAYS = {"ddp": ["--config=strategy/ddp"], "fsdp": ["--config=strategy/fsdp"]}


@pytest.fixture(scope="module")
def words(tiny_backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a run whose epoch has two optimizer steps of 8 rows; it saves at the end of each."""
    data = tmp_path_factory.mktemp("reviews")
    for split, count in (("train", 16), ("validation", 4), ("test", 4)):
        rows = [{"text": f"It is {n}.", "label": n % 2} for n in range(count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        f"--model.backbone={tiny_backbone_dir}",
        "--model.dtype=float32",
        f"--data.source={data}",
        "--data.max_length=96",
        "--data.batch_size=4",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=3",
        "--trainer.max_steps=6",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
    ]


def dying(rank: int, step: int, killed: bool) -> list[str]:
    return callback("DiesAt", rank=rank, step=step, killed=killed)


def callback(name: str, **settings: int) -> list[str]:
    return [f"--trainer.callbacks+={json.dumps({'class_path': f'dies.{name}', 'init_args': settings})}"]


Run = Callable[..., Any]


@pytest.fixture
def run(forked: ModuleType, tmp_path: Path) -> Run:
    """Runs a program of two processes, of which it starts the second; fails if it hangs."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return partial(forked.run_program, log=tmp_path / "said", environment=environment, patience=PATIENCE)


def test_a_run_survives_a_killed_process_and_a_failing_one(run: Run, words: list[str], tmp_path: Path) -> None:
    folder, program = tmp_path / "run", str(ROOT / "train.py")
    last = folder / "checkpoints" / "last.ckpt"
    fit = ["fit", "--config=demo", f"--output={folder}", *words]

    killed = run(program, *fit[:2], *OVERLAYS["ddp"], *fit[2:], "--trainer.devices=2", *dying(1, 3, killed=True))
    assert killed.code != 0
    assert read_checkpoint(last)["global_step"] == 2

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    resume = [f"--ckpt_path={last}", "--trainer.devices=2"]
    failed = run(*torchrun, program, *fit[:2], *OVERLAYS["fsdp"], *fit[2:], *resume, *dying(1, 5, killed=False))
    assert failed.code != 0
    assert "RuntimeError: rank 1 has had enough" in failed.said
    assert read_checkpoint(last)["global_step"] == 4

    before = dict(os.environ)
    main([*fit, f"--ckpt_path={last}", "--trainer.devices=1", "--trainer.accumulate_grad_batches=2"])
    for name in set(os.environ) - set(before):  # seed_everything leaves its seed in the environment
        del os.environ[name]
    assert read_checkpoint(last)["global_step"] == 6
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in range(6) if step not in steps] == []


def test_a_signal_to_one_process_stops_all_after_the_same_step(run: Run, words: list[str], tmp_path: Path) -> None:
    """It goes to the process that does not write, from which only the reduction can carry it to the other."""
    folder, program = tmp_path / "run", str(ROOT / "train.py")
    last = folder / "checkpoints" / "last.ckpt"
    fit = ["fit", "--config=demo", *OVERLAYS["ddp"], f"--output={folder}", *words, "--trainer.devices=2"]
    stopped = run(program, *fit, *callback("SignalledAt", rank=1, step=3, signum=signal.SIGTERM))
    assert stopped.code == 143, stopped.said
    assert read_checkpoint(last)["global_step"] == 3  # the middle of the second epoch
    assert f"Stopped by SIGTERM after optimizer step 3. It is saved in {last}." in stopped.said
    assert "Traceback" not in stopped.said
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
