"""README.md of an exported adapter or model: what it is, what it was trained on, how well it does, how small it became."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from grit_lightning.backbones.sources import BackboneSource
from grit_lightning.export.compaction import CompactAdapter
from grit_lightning.runs.folder import CONFIG, run_folder_of

_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM

backbone = AutoModelForCausalLM.from_pretrained({backbone})
model = PeftModel.from_pretrained(backbone, {name!r})"""
_LOAD_MERGED = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name!r})
tokenizer = AutoTokenizer.from_pretrained({name!r})"""


@dataclass(frozen=True)
class RunNotes:
    """What a run's folder says about an adapter.

    Attributes:
        config: Content of config.yaml, empty if there is none.
        summary: Content of summary.json, empty if there is none.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def beside(cls, checkpoint: Path) -> RunNotes:
        """Read the notes of the run that the checkpoint belongs to, as far as they are there."""
        folder = run_folder_of(checkpoint)
        if folder is None:
            return cls()
        summary = folder / "summary.json"
        return cls(
            config=yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")) or {},
            summary=json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {},
        )

    @property
    def data(self) -> dict[str, Any]:
        """Settings of the data module, its class under `class_path`."""
        section = self.config.get("data") or {}
        return {"class_path": section.get("class_path"), **(section.get("init_args") or {})}

    @property
    def tokenizer(self) -> str | None:
        """The tokenizer that the data were encoded with, None for the backbone's."""
        return self.data.get("tokenizer") or self.config.get("tokenizer")


def card(
    adapter: CompactAdapter,
    name: str,
    backbone: BackboneSource,
    loading: Mapping[str, Any],
    notes: RunNotes,
    steps: int | None,
    merged: bool,
) -> str:
    """Write README.md.

    Args:
        adapter: What is exported.
        name: Name of the folder.
        backbone: What the model was loaded from; its location is empty if it was given in memory.
        loading: How it was loaded: `revision` and `quantization` are mentioned.
        notes: What is known of the run.
        steps: Optimizer steps behind the exported weights, None if unknown.
        merged: Whether the adapter was merged into the backbone.
    """
    kind = "model with a merged LoRA adapter" if merged else "LoRA adapter in PEFT's format"
    known = f"`{backbone}`" if backbone.location else "a model in memory"
    quantised = f" ({loading['quantization']})" if loading.get("quantization") else ""
    duration = f" for {steps:,} optimizer steps" if steps is not None else ""
    load = _LOAD_MERGED.format(name=name) if merged else load_adapter_code(backbone, name, loading.get("revision"))
    sections = [
        _front_matter(backbone, merged),
        f"# {name}",
        f"A {kind}, trained with GRIT on {known}{quantised}{duration}. {_what_is_kept(adapter)}",
        f"```python\n{load}\n```",
        *_data(notes),
        *_metrics(notes.summary, steps),
        *_sizes(adapter),
    ]
    return "\n\n".join(sections) + "\n"


def load_adapter_code(backbone: BackboneSource, name: str, revision: str | None = None) -> str:
    """Write the lines that load the adapter in the folder `name` with plain PEFT."""
    options = {"gguf_file": backbone.gguf_file, "revision": revision}
    arguments = [repr(backbone.location), *(f"{key}={value!r}" for key, value in options.items() if value)]
    return _LOAD_ADAPTER.format(backbone=", ".join(arguments), name=name)


def _front_matter(backbone: BackboneSource, merged: bool) -> str:
    fields: dict[str, Any] = {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "grit"],
    }
    if backbone.kind == "hub":  # the hub can link to no other
        fields["base_model"] = backbone.location
    return f"---\n{yaml.safe_dump(fields, sort_keys=True).strip()}\n---"


def _data(notes: RunNotes) -> list[str]:
    data = notes.data
    if not data["class_path"]:
        return []
    source = f" from `{data['source']}`" if data.get("source") else ""
    return ["## Data", f"`{data['class_path'].rpartition('.')[2]}`{source}"]


def _metrics(summary: Mapping[str, Any], steps: int | None) -> list[str]:
    metrics = summary.get("metrics") or {}
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    rows = [(key, _shown(before.get(key)), _shown(after.get(key))) for key in sorted({*before, *after})]
    if not rows:
        return []
    measured = summary.get("global_step")
    other_step = steps is not None and measured is not None and measured != steps
    remark = [f"Measured after {measured:,} optimizer steps, not at this checkpoint."] if other_step else []
    return ["## Metrics", *remark, table(("metric", "before", "after"), rows)]


def _what_is_kept(adapter: CompactAdapter) -> str:
    if adapter.whole:
        return f"It is whole, as PEFT writes it, and not cut to effective ranks: {adapter.whole}."
    return "Each layer keeps only the rank that carries its update."


def _sizes(adapter: CompactAdapter) -> list[str]:
    if adapter.whole:
        return ["## Size", f"Parameters of the adapter: {adapter.parameters:,}."]
    saved = 1 - adapter.parameters / adapter.parameters_before
    rows = [(f"`{layer}`", str(adapter.allocated[layer]), str(rank)) for layer, rank in adapter.ranks.items()]
    return [
        "## Size",
        f"Parameters of the adapter: {adapter.parameters_before:,} while training, {adapter.parameters:,} here "
        f"({saved:.1%} fewer). Mean rank: {adapter.mean_rank:.2f}.",
        "## Ranks",
        table(("layer", "while training", "here"), rows),
    ]


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Write a table in Markdown, numbers to the right."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _shown(value: Any) -> str:
    return "—" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
