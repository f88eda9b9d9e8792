"""`grit retain`: a trained adapter taken back towards what its backbone knew, at a price for the task that is measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_lightning.cli.plain_parser import FitWordsParser
from grit_lightning.cli.run_words import settle
from grit_lightning.errors import InvalidValueError, MissingFileError
from grit_lightning.runs.atomic import require_free_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grit_lightning.cli.retain_rows import TaskRows
    from grit_lightning.cli.retain_text import Doing
    from grit_lightning.cli.settings_only import SettingsCLI
    from grit_lightning.export.retention import RetentionResult
    from grit_lightning.forgetting.general_text import GeneralRows, GeneralText

# Everything that needs torch is imported where it is used: help and errors in the words can do without it.

SELF = "self"
TARGETS = ("task_tolerance", "forgetting", "mu")
_COUNTS = ("block_size", "calibration_rows", "held_out_rows", "calibration_blocks", "held_out_blocks", "batch_size")


def retain_command(words: Sequence[str]) -> None:
    """Run `grit retain` with these command-line words."""
    parser = _parser()
    own, rest = parser.split(words)
    _check(parser, own)
    output = require_free_folder(Path(own.output))
    if own.adapter is not None:
        named = own.backbone or _backbone_of(own.adapter)
        settled = [*settle("fit", rest), f"--model.backbone={named}"]
    else:
        settled = settle("fit", [*rest, f"--ckpt_path={own.ckpt_path}"])
        settled += [f"--model.backbone={own.backbone}"] if own.backbone else []

    from grit_lightning.cli.retain_text import Doing, console_for, print_front, verdict

    console = console_for(stderr=own.json)
    with Doing(console).shown() as doing:
        result, sources = _retained(own, settled, doing)
        result.save(output)
    if own.json:
        sys.stdout.write(json.dumps(_plain(result, output), indent=2) + "\n")
        return
    print_front(console, result, sources)
    console.print(f"\n{verdict(result)}", soft_wrap=True, markup=False)
    console.print(
        f"\n{own.output}: the adapter, README.md, front.json and front.png. Plain PEFT loads it:", soft_wrap=True
    )
    console.print(_how_to_load(result, own.output), soft_wrap=True, markup=False)


def _parser() -> FitWordsParser:
    parser = FitWordsParser(
        "grit retain", "Undo what a trained adapter has forgotten, at a price for its task that is measured."
    )
    source = parser.add_argument_group("the adapter, one of")
    source.add_argument("--adapter", metavar="DIR", help="Folder of a LoRA that PEFT or `grit export` has saved.")
    source.add_argument("--ckpt_path", help="Checkpoint of a run, whose data are taken if none are named; or `last`.")
    target = parser.add_argument_group("what is asked, one of")
    target.add_argument(
        "--task_tolerance",
        type=float,
        metavar="NATS",
        help="Undo the most forgetting while the task's loss rises, or --task_metric falls, by at most this.",
    )
    target.add_argument(
        "--forgetting",
        type=float,
        metavar="NATS",
        help="The best task loss while general text is at most this above the base model's loss.",
    )
    target.add_argument("--mu", type=float, help="The strength itself; about 0.1.")
    text = parser.add_argument_group("general text")
    text.add_argument(
        "--general",
        action="append",
        default=[],
        metavar="TEXT[:WEIGHT]",
        help="File, folder or hub id of text or conversations, or `self`: the base model writes it. May be repeated.",
    )
    text.add_argument(
        "--block_size", type=int, default=256, metavar="N", help="Tokens of a block of text; 256 by default."
    )
    text.add_argument(
        "--calibration_blocks",
        type=int,
        default=48,
        metavar="N",
        help="Blocks of each text for statistics; 48 by default.",
    )
    text.add_argument(
        "--held_out_blocks", type=int, default=24, metavar="N", help="Other blocks of it to measure on; 24 by default."
    )
    task = parser.add_argument_group("the task")
    task.add_argument(
        "--calibration_rows", type=int, default=96, metavar="N", help="Training rows for statistics; 96 by default."
    )
    task.add_argument(
        "--held_out_rows", type=int, default=128, metavar="N", help="Validation rows to measure on; 128 by default."
    )
    task.add_argument(
        "--task_metric", metavar="NAME", help="Measure this of the answers too: accuracy, exact_match, rougeL, …"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="Folder to make; an existing one must be empty.")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="METHOD",
        help="Measure another method beside; may be repeated.",
    )
    parser.add_argument("--backbone", help="Backbone, if not the one that the adapter or the checkpoint names.")
    parser.add_argument("--batch_size", type=int, default=4, metavar="N", help="Rows at a time; 4 by default.")
    parser.add_argument("--device", help="Where to compute; on the GPU if not given, or on the CPU if there is none.")
    parser.add_argument("--json", action="store_true", help="Print all that was measured as JSON.")
    return parser


def _check(parser: FitWordsParser, own: argparse.Namespace) -> None:
    """Check what the words alone can tell."""
    for names, more in ((("adapter", "ckpt_path"), ""), (TARGETS, ", such as --task_tolerance 0.005")):
        given = [f"--{name}" for name in names if getattr(own, name) is not None]
        if len(given) != 1:
            wanted = ", ".join(f"--{name}" for name in names)
            parser.error(f"expected exactly one of {wanted}{more}, got {' and '.join(given) or 'none'}.")
    if not own.general:
        parser.error(
            "--general: expected a file, folder or hub id of general text, or `self` to have the base model write it, got none."
        )
    for name in _COUNTS:
        if getattr(own, name) < 1:
            parser.error(f"--{name}: expected a number of at least 1, got {getattr(own, name)}.")
    for name in ("task_tolerance", "mu"):
        value = getattr(own, name)
        if value is not None and not 0 <= value < float("inf"):
            parser.error(f"--{name}: expected a number of at least 0, got {value}.")
    if sum(words.partition(":")[0] == SELF for words in own.general) > 1:
        parser.error("--general self: expected it once, got it several times. Leave it out but once.")
    if own.task_metric is not None and own.task_tolerance is None:
        parser.error("--task_metric: expected --task_tolerance, which it is the measure of, got none. Add it.")


def _backbone_of(folder: str) -> str:
    """Return the backbone that a PEFT folder names."""
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        raise MissingFileError(
            f"--adapter: expected a folder with adapter_config.json, as PEFT writes it, got {folder}, which has none."
        )
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("peft_type") != "LORA" or settings.get("use_dora"):
        kind = "DoRA" if settings.get("use_dora") else settings.get("peft_type")
        raise InvalidValueError(
            f"--adapter: expected a plain LoRA, whose B can be edited by itself, got a {kind} in {folder}. Choose another."
        )
    named: str | None = settings.get("base_model_name_or_path")
    if not named:
        raise InvalidValueError(
            f"--backbone: expected the model that {folder} was trained on, as its adapter_config.json names none, got none. "
            "Set it."
        )
    return named


def _retained(own: argparse.Namespace, words: Sequence[str], doing: Doing) -> tuple[RetentionResult, list[str]]:
    """Read everything, and edit the adapter; nothing is written."""
    from grit_lightning.cli.settings_only import SettingsCLI
    from grit_lightning.export.retention import retain_adapter

    peers = _peers(own.compare)
    cli = SettingsCLI(words)
    seed = int(cli.config["fit"].seed_everything)
    task = _task(own, cli, seed)
    backbone, general = _general(own, cli, seed, doing)
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
    from grit_lightning.backbones.shapes import empty_backbone
    from grit_lightning.cli.retain_rows import task_rows
    from grit_lightning.module import GritLitModule
    from grit_lightning.preflight import require_data_fits

    module = cli.model
    if not isinstance(module, GritLitModule):
        raise InvalidValueError(f"model: expected a GritLitModule, got a {type(module).__name__}.")
    cli.datamodule.trainer = cli.trainer
    shapes = empty_backbone(**module.backbone_options)
    require_data_fits(shapes, cli.datamodule)
    settings = module.answer_evaluations.settings
    rows = task_rows(
        cli.datamodule, own.calibration_rows, own.held_out_rows, seed, own.task_metric, settings, own.batch_size
    )
    require_data_fits(shapes, cli.datamodule)  # its longest row may be known only now
    return rows


def _general(
    own: argparse.Namespace, cli: SettingsCLI, seed: int, doing: Doing
) -> tuple[PreTrainedModel, dict[str, GeneralRows]]:
    """Read general text, load the backbone, and have it write its own text if that is asked for."""
    import torch

    from grit_lightning.backbones.loading import load_backbone
    from grit_lightning.forgetting.general_text import GeneralText, read_general

    sources = [GeneralText.parse(words) for words in own.general]
    tokenizer = _tokenizer(cli)
    texts = [source for source in sources if source.source != SELF]
    written = [source for source in sources if source.source == SELF]
    sizes = {"block_size": own.block_size, "calibration": own.calibration_blocks, "held_out": own.held_out_blocks}
    general = read_general(texts, tokenizer, **sizes, seed=seed)
    options = {**cli.model.backbone_options, "gradient_checkpointing": False}
    backbone = load_backbone(**options)
    device = own.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if backbone.device != torch.device(device):
        backbone.to(device)  # type: ignore[arg-type]  # takes a name too
    if written:
        general[SELF] = _self_written(own, written[0], backbone, tokenizer, seed, doing)
    return backbone, general


def _self_written(
    own: argparse.Namespace, source: GeneralText, backbone: PreTrainedModel, tokenizer: Any, seed: int, doing: Doing
) -> GeneralRows:
    from grit_lightning.forgetting.general_text import GeneralRows
    from grit_lightning.forgetting.self_written import write_general

    sides = [
        write_general(
            backbone,
            tokenizer,
            count,
            block_size=own.block_size,
            batch_size=max(own.batch_size, 16),  # nothing is kept for a backward pass
            seed=seed + number,
            progress=lambda _, done, total, name=name: doing(name, done, total),  # type: ignore[misc]
        )
        for number, (name, count) in enumerate(
            {"text of its own": own.calibration_blocks, "text of its own, held out": own.held_out_blocks}.items()
        )
    ]
    remark = f"{len(sides[0])} rows that the base model has written, {len(sides[1])} others held out"
    return GeneralRows(sides[0], sides[1], source.weight, remark)


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
