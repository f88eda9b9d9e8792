"""README.md of a retained adapter: what was undone, at what price, and beside what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]

from grit_lightning.backbones.sources import BackboneSource, resolve_source
from grit_lightning.editing.front import FrontPoint
from grit_lightning.editing.measuring import Change
from grit_lightning.export.card import load_adapter_code, table

if TYPE_CHECKING:
    from grit_lightning.export.retention import RetentionResult


def retention_card(result: RetentionResult, name: str) -> str:
    """Write README.md for the folder `name`."""
    notes, chosen, target = result.notes, result.chosen, result.target
    unedited, backbone = result.front[0], result.front[1]
    asked = {
        "task_tolerance": f"the most forgetting undone at a task cost of at most {target.value:g}",
        "forgetting": f"the best task loss with general text at most {target.value:g} nats per token above the backbone",
        "mu": f"strength μ = {target.value:g}",
    }[target.kind]
    if target.kind == "task_tolerance" and chosen.metric is not None:
        asked += " of its metric"
    aim = "as little forgetting" if target.kind == "mu" else "same target"
    rows = [
        ("backbone", backbone),
        ("unedited adapter", unedited),
        (f"this adapter (μ = {chosen.mu:.3g})", chosen),
        *((f"{peer}, {aim}", point) for peer, point in result.peers.items() if point is not None),
    ]
    failed = [peer for peer, point in result.peers.items() if point is None]
    known = f"`{notes['backbone']}`" if notes["backbone"] else "a model without a name"
    origin = f"`{notes['adapter']}`" if "/" in notes["adapter"] else notes["adapter"]
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(notes), sort_keys=True).strip()}\n---",
        f"# {name}",
        f"A LoRA adapter in PEFT's format: {origin}, trained on {known}, edited so that it "
        f"keeps what its backbone knew (GRIT, retention by two Fishers; method `{notes['method']}`). Asked for: {asked}.",
        f"```python\n{load_adapter_code(_source(notes['backbone']), name, notes['revision'])}\n```",
        "## Measured on held-out rows",
        f"Nats per token; changes with paired {notes['confidence']:.0%} bootstrap intervals over rows. The task's change is "
        "from the unedited adapter, general text's from the backbone. The strength was chosen on these rows: on others the "
        "task may cost a little more than was asked.",
        table(("", *_header(chosen)), [(label, *_cells(point)) for label, point in rows]),
        *([f"No strength of {', '.join(failed)} keeps to the target."] if failed else []),
        "## Read",
        table(
            ("", "rows", "tokens"),
            [(f"calibration: {k}", *_size(v)) for k, v in notes["calibration"].items()]
            + [(f"held out: {k}", *_size(v)) for k, v in notes["held_out"].items()],
        ),
        "`front.json` holds every strength that was measured, beside what was predicted; `front.png` draws it.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(notes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "grit", "retention"],
    }
    if _source(notes["backbone"]).kind == "hub":
        fields["base_model"] = notes["backbone"]
    return fields


def _source(backbone: str) -> BackboneSource:
    if not backbone:
        return BackboneSource("folder", "path/to/its/backbone")  # a model in memory without a name
    try:
        return resolve_source(backbone)
    except (OSError, ImportError, ValueError):
        return BackboneSource("folder", backbone)


def _header(point: FrontPoint) -> list[str]:
    names = ["task loss", "change", "general loss", "change"]
    if point.metric is not None:
        names += ["task metric", "change"]
    return names + [name for name in point.beside if name != "task"]


def _cells(point: FrontPoint) -> list[str]:
    cells = [f"{point.task.value:.4f}", shown(point.task), f"{point.general.value:.4f}", shown(point.general)]
    if point.metric is not None:
        cells += [f"{point.metric.value:.4f}", shown(point.metric)]
    return cells + [shown(change) for name, change in point.beside.items() if name != "task"]


def shown(change: Change) -> str:
    """Write a change with its interval: `+0.0012 (−0.0003 … +0.0027)`."""
    if change.interval is None or change.change == 0.0 == change.interval[0] == change.interval[1]:
        return f"{change.change:+.4f}"
    low, high = change.interval
    return f"{change.change:+.4f} ({low:+.4f} … {high:+.4f})"


def _size(size: dict[str, int]) -> tuple[str, str]:
    return f"{size['rows']:,}", f"{size['tokens']:,}"
