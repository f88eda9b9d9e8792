"""`grit plan`: what a run will take, before it is started: layers, memory by part, optimizer steps, checkpoint, time."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from grit_lightning.cli.plain_parser import FitWordsParser
from grit_lightning.cli.plan_text import print_plan
from grit_lightning.cli.run_words import settle
from grit_lightning.errors import InvalidValueError

if TYPE_CHECKING:
    from grit_lightning.cli.measured_run import Measured
    from grit_lightning.cli.settings_only import SettingsCLI
    from grit_lightning.planning.plan import Plan

DEVICES = 2
"""Processes that DDP and FSDP are reckoned for where the settings have one only."""
STEPS = 3
"""Steps that `--measure` times by itself."""


def plan_command(words: Sequence[str]) -> None:
    """Run `grit plan` with these command-line words."""
    parser = FitWordsParser("grit plan", "Say what a run will take, before it is started and without its weights.")
    parser.add_argument(
        "--devices", type=int, help=f"Processes for the columns of DDP and FSDP (default: the run's, or {DEVICES})."
    )
    help_of_measure = f"Train some steps ({STEPS}) on one device, and measure time and memory; nothing of them is kept."
    parser.add_argument("--measure", type=int, nargs="?", const=STEPS, metavar="STEPS", help=help_of_measure)
    parser.add_argument("--json", action="store_true", help="Print it as JSON, sizes in bytes.")
    own, rest = parser.split(words)
    for name in ("devices", "measure"):
        if (given := getattr(own, name)) is not None and given < 1:
            parser.error(f"--{name}: expected a number of at least 1, got {given}.")
    settled = settle("fit", rest)

    from grit_lightning.cli.settings_only import SettingsCLI  # the first import of torch

    report = make_report(SettingsCLI(settled), own.devices, own.measure)
    if own.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        print_plan(report)


def make_report(cli: SettingsCLI, devices: int | None = None, measured_steps: int | None = None) -> dict[str, Any]:
    """Return everything that `grit plan` says, as plain values; sizes in bytes, times in seconds.

    Args:
        cli: The settings of the run.
        devices: Processes for the columns of DDP and FSDP; None for the run's own, or `DEVICES`.
        measured_steps: Steps to measure; None for none.

    Raises:
        ValueError: If the settings do not fit each other, or several processes are to be measured.
    """
    from grit_lightning.module import GritLitModule
    from grit_lightning.planning.batch_shapes import largest_allowed, largest_of_first_epoch
    from grit_lightning.planning.plan import plan_of

    processes = cli.processes or 1
    if measured_steps is not None and processes > 1:
        raise InvalidValueError(
            f"--measure: expected a run on one process, got one on {processes}. Set --trainer.devices 1 and "
            "--trainer.num_nodes 1; the plan for several processes needs no --measure."
        )
    if not isinstance(cli.model, GritLitModule):
        raise InvalidValueError(f"model: expected a GritLitModule to plan for, got a {type(cli.model).__name__}.")
    placement = _placement(cli.trainer_settings.get("strategy", "auto"), processes)
    steps = cli.count_steps()
    plan = plan_of(
        cli.model,
        largest_of_first_epoch(cli.datamodule),
        largest_allowed(cli.datamodule),
        cli.trainer.precision_plugin,
        processes=devices or (processes if processes > 1 else DEVICES),
        accumulates=cli.trainer.accumulate_grad_batches > 1,
    )
    report = _report(cli, plan, steps, placement)
    if measured_steps is not None:
        from grit_lightning.cli.measured_run import measure

        report["measured"] = _compared(measure(cli, measured_steps, plan.batch), steps, plan)
    return report


def _placement(strategy: Any, processes: int) -> str:
    """Return what the run's strategy does with the model: one device, DDP or FSDP.

    Raises:
        MisconfigurationException: If it would split the adapter.
        ValueError: If it is not known.
    """
    from lightning.pytorch.strategies import DDPStrategy, Strategy

    from grit_lightning.distributed.strategies import SUPPORTED, WholeAdapterStrategy, require_supported

    if isinstance(strategy, Strategy):
        require_supported(strategy)
    elif strategy != "auto" and not str(strategy).startswith(SUPPORTED):
        raise InvalidValueError(
            f"trainer.strategy: expected auto or one of {', '.join(SUPPORTED)}, got {strategy!r}. Set it to one of them."
        )
    if isinstance(strategy, WholeAdapterStrategy) or str(strategy).startswith("grit_fsdp"):
        return "FSDP"
    if isinstance(strategy, DDPStrategy) or processes > 1 or str(strategy).startswith("ddp"):
        return "DDP"
    return "one device"


def _report(cli: SettingsCLI, plan: Plan, steps: int | None, placement: str) -> dict[str, Any]:
    windows = int(cli.trainer.accumulate_grad_batches)
    rows = int(getattr(cli.datamodule, "batch_size", plan.batch.rows))
    options = cli.model.backbone_options
    return {
        "backbone": {
            "source": str(cli.model.hparams["backbone"]),
            "parameters": plan.backbone_parameters,
            "dtype": plan.dtype,
            "quantization": options["quantization"],
        },
        "adapter": {"layers": plan.layers, "trainable_parameters": plan.trainable_parameters},
        "run": {
            "placement": placement,
            "processes": cli.processes,
            "optimizer_steps": steps,
            "rows_a_step": rows * windows * (cli.processes or 1),
            "rows_a_micro_batch": rows,
            "micro_batches_a_step": windows,
        },
        "micro_batch": asdict(plan.batch),
        "memory": {name: asdict(parts) | {"total": parts.total} for name, parts in plan.placements.items()},
        "logits": plan.logits,
        "activations_at_most": plan.bound,
        "checkpoint": plan.checkpoint,
    }


def _compared(measured: Measured, steps: int | None, plan: Plan) -> dict[str, Any]:
    return asdict(measured) | {
        "estimated": plan.parts.total,
        "time_to_finish": None if steps is None else steps * measured.seconds_per_step,
    }
