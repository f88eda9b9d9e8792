"""`grit retain`: a trained adapter taken back towards what its backbone knew, at a price for the task that is measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_lightning.cli.retain_words import SELF, TARGETS, backbone_words, check_words, output_folder, retain_parser
from grit_lightning.cli.run_words import settle
from grit_lightning.errors import InvalidValueError
from grit_lightning.runs.atomic import replaced_folder, require_writable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from grit_lightning.cli.retain_rows import TaskRows
    from grit_lightning.cli.retain_text import Doing
    from grit_lightning.cli.settings_only import SettingsCLI
    from grit_lightning.export.retention import RetentionResult
    from grit_lightning.forgetting.general_source import GeneralText
    from grit_lightning.forgetting.general_text import GeneralRows, Row

# Everything that needs torch is imported where it is used: help and errors in the words can do without it.


def retain_command(words: Sequence[str]) -> None:
    """Run `grit retain` with these command-line words."""
    parser = retain_parser()
    own, rest = parser.split(words)
    check_words(parser, own)
    output = output_folder(own)
    require_writable(output)
    if own.adapter is not None:
        backbone = backbone_words(own.adapter, own.backbone)  # what is wrong with the folder is said before the data
        settled = [*settle("fit", rest), *backbone]
    else:
        settled = settle("fit", [*rest, f"--ckpt_path={own.ckpt_path}"])
        settled += [f"--model.backbone={own.backbone}"] if own.backbone else []

    from grit_lightning.cli.retain_text import Doing, console_for, print_front, verdict

    console = console_for(stderr=own.json)
    with Doing(console).shown() as doing:
        result, sources = _retained(own, settled, doing)
        _write(result, output)
    if own.json:
        sys.stdout.write(json.dumps(_plain(result, output), indent=2) + "\n")
        return
    print_front(console, result, sources)
    console.print(f"\n{verdict(result)}", soft_wrap=True, markup=False)
    console.print(
        f"\n{own.output}: the adapter, README.md, front.json and front.png. Plain PEFT loads it:", soft_wrap=True
    )
    console.print(_how_to_load(result, own.output), soft_wrap=True, markup=False)


def _retained(own: argparse.Namespace, words: Sequence[str], doing: Doing) -> tuple[RetentionResult, list[str]]:
    """Read everything, and edit the adapter; nothing is written."""
    from grit_lightning.cli.settings_only import SettingsCLI
    from grit_lightning.export.retention import retain_adapter
    from grit_lightning.forgetting.general_source import GeneralText

    peers = _peers(own.compare)
    device = _device(own.device)
    sources = [GeneralText.parse(words) for words in own.general]
    cli = SettingsCLI(words)
    seed = int(cli.config["fit"].seed_everything)
    task = _task(own, cli, seed)
    backbone, general = _general(own, cli, seed, sources, device, doing)
    for remark in [*task.remarks, *(f"{name}: {rows.remark}" for name, rows in general.items())]:
        doing.say(remark)
    result = retain_adapter(
        own.adapter or cli.config["fit"].ckpt_path,
        task.calibration,
        {name: rows.calibration for name, rows in general.items()},
        task.held_out,
        {name: rows.held_out for name, rows in general.items()},
        **{name: getattr(own, name) for name in TARGETS},
        backbone=backbone,
        general_weights={name: rows.weight for name, rows in general.items()},
        task_metric=task.metric,
        compare=peers,
        batch_size=own.batch_size,
        progress=doing,
    )
    return result, list(general)


def _write(result: RetentionResult, output: Path) -> None:
    """Write the folder; one that is there already stays until the new one is whole."""
    if not output.is_dir() or not any(output.iterdir()):
        result.save(output)
        return
    with replaced_folder(output) as new:
        result.save(new)


def _peers(named: Sequence[str]) -> list[str]:
    """Return the methods to measure beside ours: scaling, and those that are asked for."""
    from grit_lightning.editing import METHODS
    from grit_lightning.errors import did_you_mean

    others = list(METHODS)[1:]
    if unknown := [name for name in named if name not in (*others, "all")]:
        raise InvalidValueError(
            f"--compare: expected one of {', '.join(others)}, or all, got {unknown[0]!r}.{did_you_mean(unknown[0], others)}"
        )
    return others if "all" in named else list(dict.fromkeys(["scaling", *named]))


def _task(own: argparse.Namespace, cli: SettingsCLI, seed: int) -> TaskRows:
    from grit_lightning.backbones.inputs import context_length
    from grit_lightning.backbones.shapes import empty_backbone
    from grit_lightning.cli.retain_rows import task_rows
    from grit_lightning.module import GritLitModule
    from grit_lightning.preflight import require_data_fits

    module = cli.model
    if not isinstance(module, GritLitModule):
        raise InvalidValueError(f"model: expected a GritLitModule, got a {type(module).__name__}.")
    cli.datamodule.trainer = cli.trainer
    shapes = empty_backbone(**module.backbone_options)
    context = context_length(shapes)
    if context is not None and own.block_size > context:
        raise InvalidValueError(
            f"--block_size: expected at most the {context} tokens of the model's context, got {own.block_size}. Lower it."
        )
    require_data_fits(shapes, cli.datamodule)
    settings = module.answer_evaluations.settings
    rows = task_rows(
        cli.datamodule, own.calibration_rows, own.held_out_rows, seed, own.task_metric, settings, own.batch_size
    )
    require_data_fits(shapes, cli.datamodule)  # its longest row may be known only now
    return rows


def _general(
    own: argparse.Namespace,
    cli: SettingsCLI,
    seed: int,
    sources: Sequence[GeneralText],
    device: torch.device,
    doing: Doing,
) -> tuple[PreTrainedModel, dict[str, GeneralRows]]:
    """Read general text, load the backbone, and have it write its own text if that is asked for."""
    from grit_lightning.backbones.loading import load_backbone
    from grit_lightning.forgetting.general_text import read_general

    tokenizer = _tokenizer(cli)
    texts = [source for source in sources if source.source != SELF]
    written = [source for source in sources if source.source == SELF]
    sizes = {"block_size": own.block_size, "calibration": own.calibration_blocks, "held_out": own.held_out_blocks}
    general = read_general(texts, tokenizer, **sizes, seed=seed)
    options = {**cli.model.backbone_options, "gradient_checkpointing": False}
    backbone = load_backbone(**options)
    if not _is_on(backbone.device, device):
        backbone.to(device)
    if written:
        general[SELF] = _self_written(own, written[0], backbone, tokenizer, seed, doing)
    return backbone, general


def _device(name: str | None) -> torch.device:
    """Return where to compute, where something has been computed.

    Raises:
        ValueError: There is no such device here.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the second without CUDA, the third of `meta`
        raise InvalidValueError(
            f"--device: expected a device that torch can compute on here, such as cpu, cuda or cuda:0, got {name!r}. "
            f"torch says: {str(error).splitlines()[0]}"
        ) from error
    return torch.device(name)


def _is_on(found: torch.device, wanted: torch.device) -> bool:
    """Whether a device is the one that is wanted; `cuda` is any GPU."""
    return found.type == wanted.type and wanted.index in (None, found.index)


def _self_written(
    own: argparse.Namespace, source: GeneralText, backbone: PreTrainedModel, tokenizer: Any, seed: int, doing: Doing
) -> GeneralRows:
    from grit_lightning.forgetting.general_text import GeneralRows
    from grit_lightning.forgetting.self_written import write_general

    def write(name: str, count: int, seed: int, apart_from: Sequence[Row] = ()) -> list[Row]:
        return write_general(
            backbone,
            tokenizer,
            count,
            block_size=own.block_size,
            batch_size=max(own.batch_size, 16),  # nothing is kept for a backward pass
            seed=seed,
            apart_from=apart_from,
            progress=lambda _, done, total: doing(name, done, total),
        )

    calibration = write("text of its own", own.calibration_blocks, seed)
    held_out = write("text of its own, held out", own.held_out_blocks, seed + 1, calibration)
    talks = sum(row["learnt"][0] > 1 for row in calibration)
    remark = (
        f"{len(calibration)} rows that the base model has written ({talks} conversations), {len(held_out)} held out"
    )
    if len(held_out) < own.held_out_blocks:
        remark += f" and not {own.held_out_blocks}, as it went on writing the same"
    return GeneralRows(calibration, held_out, source.weight, remark)


def _tokenizer(cli: SettingsCLI) -> Any:
    from grit_lightning.backbones.loading import load_tokenizer
    from grit_lightning.evaluation.datamodule_protocols import HasTokenizer, tasks_of

    task = next(iter(tasks_of(cli.datamodule).values()))
    if isinstance(task, HasTokenizer):
        return task.tokenizer
    return load_tokenizer(cli.config["fit"].tokenizer or cli.model.backbone_options["source"])


def _plain(result: RetentionResult, output: Path) -> dict[str, Any]:
    from grit_lightning.runs.values import jsonable

    plain = jsonable({"output": str(output), **result.to_dict()})
    assert isinstance(plain, dict)
    return plain


def _how_to_load(result: RetentionResult, output: str) -> str:
    from grit_lightning.backbones.sources import resolve_source
    from grit_lightning.export.card import load_adapter_code

    named = str(result.notes["backbone"])
    return "\n".join(f"    {line}" for line in load_adapter_code(resolve_source(named), output).splitlines())
