"""Runs cases on several processes, one after the other, so that a case that fails takes only its own tests along.

Every case leaves a file by process, with what it returned or its traceback. Every case also has a process group of its own,
which all processes enter together: where one process has failed, its connections close and the others fail in the same case
(at the latest after `PATIENCE`), and then all go on with the next one.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

Case = Callable[[], Any]
PATIENCE = timedelta(seconds=60)
"""How long a collective waits for the other processes."""


def run_on_processes(processes: int, cases: Mapping[str, Case], out: Path) -> None:
    """Run all cases on so many processes, in step.

    The processes are forked from this one, which has imported everything for them and computed nothing yet.

    Args:
        processes: Their number.
        cases: By name.
        out: Folder of the results.

    Raises:
        Exception: If a process comes to its end before it has run all cases; the others are stopped.
    """
    torch.multiprocessing.start_processes(_run_in_step, (processes, cases, out), processes, start_method="fork")


def _run_in_step(rank: int, processes: int, cases: Mapping[str, Case], out: Path) -> None:
    # what torchrun sets; without an id of the run, Lightning would take the processes for its own
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "TORCHELASTIC_RUN_ID": "in step",
    }
    for name, case in cases.items():
        store = dist.FileStore(str(out / f"{name}.store"), processes)
        _meet("case", store, rank, processes)
        succeeds = run_case(name, partial(_in_group, case, store, rank, processes), out, rank)
        if dist.is_initialized():
            dist.destroy_process_group()
        if not succeeds:
            gc.collect()  # closes the connections of what still holds the group, so that no other process waits for it


def _in_group(case: Case, store: dist.Store, rank: int, processes: int) -> Any:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=PATIENCE)
    # Else a case that fails at once closes connections that others are still making.
    _meet("group", store, rank, processes)
    return case()


def _meet(where: str, store: dist.Store, rank: int, processes: int) -> None:
    """Wait until all processes are here."""
    store.set(f"{where}/{rank}", "")
    store.wait([f"{where}/{other}" for other in range(processes)], 2 * PATIENCE)


def run_case(name: str, case: Case, out: Path, rank: int = 0) -> bool:
    """Write what a case returns, or its traceback, into a file of its own; return whether it has returned."""
    try:
        result = {"returned": case()}
    except Exception:
        result = {"traceback": traceback.format_exc()}
    torch.save(result, out / f"{name}-{rank}.pt")
    return "returned" in result


def read_result(name: str, out: Path, rank: int = 0) -> Any:
    """Return what a case has returned on a process.

    Raises:
        RuntimeError: If it has failed there, with its traceback, or if it has left no result.
    """
    path = out / f"{name}-{rank}.pt"
    if not path.exists():
        said = (out / "launch.log").read_text(encoding="utf-8") if (out / "launch.log").exists() else ""
        raise RuntimeError(f"Case '{name}' has left no result on process {rank}. The launch said:\n{said}")
    result = torch.load(path, weights_only=True)
    if "traceback" in result:
        raise RuntimeError(f"Case '{name}' has failed on process {rank}:\n{result['traceback']}")
    return result["returned"]
