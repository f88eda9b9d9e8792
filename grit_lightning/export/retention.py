"""Take a trained adapter back towards what its backbone knew, and write it as a plain PEFT folder."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from grit_lightning.editing.adapter import EditableAdapter, edited_factor
from grit_lightning.editing.front import Front, FrontPoint, Target
from grit_lightning.editing.measuring import HeldOut, Measurer, Metric
from grit_lightning.editing.methods import METHODS
from grit_lightning.editing.rows import Rows
from grit_lightning.editing.statistics import AdapterStatistics, Progress, measure_statistics
from grit_lightning.errors import require
from grit_lightning.export.front_figure import draw_front
from grit_lightning.export.opening import AdapterSource, OpenAdapter, opened_adapter
from grit_lightning.export.retention_card import retention_card
from grit_lightning.export.retention_checks import (
    require_something_to_do,
    require_usable_rows,
    source_weights,
    unmet_target,
)
from grit_lightning.runs.atomic import atomic_folder, require_free_folder, write_json


@dataclass(frozen=True)
class EditedAdapter:
    """An adapter in PEFT's file format.

    Attributes:
        config: Its configuration, as it was.
        tensors: Its parameters under the names of `adapter_model.safetensors`; only B of the edited layers is new.
    """

    config: PeftConfig
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class RetentionResult:
    """A retained adapter, and how it was chosen.

    Attributes:
        adapter: The adapter, to be written.
        front: Everything that was measured, by method and strength; first the unedited adapter, then the backbone.
        chosen: The point of the front that `adapter` is.
        peers: The best point of every other method for the same target (for as little forgetting, beside a `mu`); None where no
            strength keeps to it.
        target: What was asked.
        maps: X `[r, r]` of every layer, by its name in the model.
        notes: Where everything came from, for the card and front.json.
    """

    adapter: EditedAdapter
    front: Sequence[FrontPoint]
    chosen: FrontPoint
    peers: Mapping[str, FrontPoint | None]
    target: Target
    maps: Mapping[str, Tensor]
    notes: Mapping[str, Any]

    @property
    def mu(self) -> float:
        """Strength of the chosen edit."""
        return self.chosen.mu

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a folder that plain PEFT loads, with a card, `front.json` and `front.png`; it appears whole or not at all.

        Raises:
            FileExistsError: The folder is not empty.
            NotADirectoryError: It is a file.
            OSError: It cannot be written.
        """
        output = require_free_folder(Path(folder))
        with atomic_folder(output) as unfinished:
            content = save(dict(self.adapter.tensors), metadata={"format": "pt"})
            (unfinished / "adapter_model.safetensors").write_bytes(content)
            self.adapter.config.save_pretrained(str(unfinished))
            write_json(unfinished / "front.json", self.to_dict())
            draw_front(self.front, self.chosen, unfinished / "front.png")
            (unfinished / "README.md").write_text(retention_card(self, output.name), encoding="utf-8")
        return output

    def to_dict(self) -> dict[str, Any]:
        """Return the front as plain values."""
        return {
            "target": asdict(self.target),
            "mu": self.mu,
            "chosen": self.chosen.to_dict(),
            "peers": {name: None if point is None else point.to_dict() for name, point in self.peers.items()},
            "front": [point.to_dict() for point in self.front],
            **self.notes,
        }


def retain_adapter(
    adapter: AdapterSource,
    task_rows: Rows,
    general_rows: Mapping[str, Rows],
    held_out_task: Rows,
    held_out_general: Mapping[str, Rows],
    *,
    task_tolerance: float | None = None,
    forgetting: float | None = None,
    mu: float | None = None,
    backbone: str | PreTrainedModel | None = None,
    general_weights: Mapping[str, float] | None = None,
    beside: Mapping[str, Rows] | None = None,
    task_metric: Metric | None = None,
    compare: Sequence[str] = ("scaling",),
    method: str = "retention",
    damping: float = 1e-4,
    batch_size: int = 4,
    evaluations: int = 8,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> RetentionResult:
    """Undo forgetting in a trained LoRA adapter, at a price for its task that is measured.

    Two passes over calibration rows give the curvature of the task and of general text in the adapter's rank spaces; a closed
    form then says what of every layer to keep (`functional.retention_map`), and its strength is found by measuring on held-out
    rows. The adapter that is read is never changed. A row is a mapping with `input_ids` and `learnt` or `prompt_length`, see
    `editing.rows`.

    Args:
        adapter: A PEFT model with a LoRA, the folder of one, or a checkpoint of a `GritLitModule`.
        task_rows: Calibration rows of the task; about 100.
        general_rows: Calibration rows of general text, by source; about 50 blocks of 256 tokens each.
        held_out_task: Other rows of the task, to measure on.
        held_out_general: Other general text, to measure on, by source; it need not be the sources of `general_rows`.
        task_tolerance: Undo the most forgetting while the task's held-out loss rises by at most this, in nats per token; with a
            `task_metric`, while that falls by at most this.
        forgetting: Find the best task loss at which general text is at most this many nats per token above the backbone.
        mu: Or the strength itself: what a nat of general text (for each predicted token) is worth in nats of the task (for
            each token that is read).
        backbone: As in `load_backbone`, or a loaded model; None for what the adapter names.
        general_weights: Weight of each source in the statistics and in the mean over held-out sets, 1 where it has none.
        beside: Further held-out rows, which are reported and do not steer.
        task_metric: A metric of the task besides its loss, for `task_tolerance`.
        compare: Other methods to search for the same target, of `editing.METHODS`; beside a `mu`, for as little forgetting as
            that leaves.
        method: The method that makes the adapter.
        damping: See `functional.retention_map`.
        batch_size: Rows at a time.
        evaluations: The most strengths of a method to measure.
        confidence: Level of the intervals, in (0, 1).
        progress: Is told what is being done, and how much of it.

    Returns:
        The retained adapter and the front that was measured.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: A setting or the rows are unusable, the adapter is no plain LoRA, or no strength meets the target.
        FloatingPointError: A loss or a gradient is not finite.
    """
    target = Target.one_of(task_tolerance=task_tolerance, forgetting=forgetting, mu=mu)
    for name in (method, *compare):
        require("retain", "method", name in METHODS, f"one of {', '.join(METHODS)}", name)
    for name, number in (("batch_size", batch_size), ("evaluations", evaluations)):
        require("retain", name, number >= 1, "an integer ≥ 1", number)
    require("retain", "confidence", 0.0 < confidence < 1.0, "a number in (0, 1)", confidence)
    require("retain", "damping", 0.0 <= damping < math.inf, "a finite number ≥ 0", damping)
    weights = source_weights(general_rows, held_out_general, general_weights or {})
    start = time.perf_counter()
    with opened_adapter(adapter, backbone) as opened:
        editable = EditableAdapter(opened.model, _dtypes(opened))
        held_out = [HeldOut("task", held_out_task, "task")]
        held_out += [HeldOut(name, rows, "general", weights[name]) for name, rows in held_out_general.items()]
        held_out += [HeldOut(name, rows, "beside") for name, rows in (beside or {}).items()]
        require_usable_rows(editable, task_rows, general_rows, held_out)
        task = measure_statistics(opened.model, task_rows, batch_size, progress, "statistics of the task")
        parts = [
            measure_statistics(opened.model, rows, batch_size, progress, f"statistics of {name}")
            for name, rows in general_rows.items()
        ]
        general = AdapterStatistics.mixed(parts, [weights[name] for name in general_rows])
        measurer = Measurer(opened.model, held_out, 2 * batch_size, task_metric, confidence, progress)
        front = Front(editable, task, general, measurer, damping)
        require_something_to_do(front, target)
        chosen = front.search(method, target, evaluations)
        if chosen is None:
            raise unmet_target(front, method, target)
        others = [name for name in compare if name != method]
        level = Target("forgetting", chosen.general.change) if target.kind == "mu" else target
        peers = {name: front.search(name, level, evaluations) for name in others}
        maps = front.maps(chosen)
        notes = {
            "adapter": opened.origin,
            "backbone": opened.backbone,
            "method": method,
            "damping": damping,
            "confidence": confidence,
            "calibration": _sizes({"task": task_rows, **general_rows}),
            "held_out": _sizes({one.name: one.rows for one in held_out}),
            "general_weights": weights,
            "revision": getattr(opened.config, "revision", None),
            "seconds": round(time.perf_counter() - start, 1),
        }
        return RetentionResult(
            _edited(opened, maps),
            [*front.points[:2], *sorted(front.points[2:], key=lambda p: (p.method, p.mu))],
            chosen,
            peers,
            target,
            maps,
            notes,
        )


def _dtypes(opened: OpenAdapter) -> dict[str, torch.dtype]:
    """Return the dtype of every B on file, by the layer's name in the model."""
    ending = ".lora_B.weight"
    return {name.removesuffix(ending): b.dtype for name, b in opened.tensors.items() if name.endswith(ending)}


def _edited(opened: OpenAdapter, maps: Mapping[str, Tensor]) -> EditedAdapter:
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in opened.tensors.items()}
    for layer, x in maps.items():
        name = f"{layer}.lora_B.weight"
        tensors[name] = edited_factor(tensors[name], x.cpu()).contiguous()
    return EditedAdapter(opened.config, tensors)


def _sizes(sets: Mapping[str, Rows]) -> dict[str, dict[str, int]]:
    return {
        name: {"rows": len(rows), "tokens": sum(len(row["input_ids"]) for row in rows)} for name, rows in sets.items()
    }
