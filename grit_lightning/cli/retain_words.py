"""The words of `grit retain`, as far as they can be understood before torch is imported."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

from grit_lightning.cli.plain_parser import FitWordsParser
from grit_lightning.errors import FileTakenError, InvalidValueError, MissingFileError
from grit_lightning.runs.atomic import require_free_folder

SELF = "self"
"""The general text that the base model writes."""
TARGETS = ("task_tolerance", "forgetting", "mu")
_WRITTEN = {"README.md", "adapter_config.json", "adapter_model.safetensors", "front.json", "front.png"}
_COUNTS = ("block_size", "calibration_rows", "held_out_rows", "calibration_blocks", "held_out_blocks", "batch_size")


def retain_parser() -> FitWordsParser:
    """Return the parser of its own options; the others are those of `grit fit`."""
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
    parser.add_argument("--overwrite", action="store_true", help="Replace what `grit retain` has written there before.")
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


def check_words(parser: FitWordsParser, own: argparse.Namespace) -> None:
    """Check what the words alone can tell; what is wrong exits with status 2."""
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
    if own.forgetting is not None and not math.isfinite(own.forgetting):
        parser.error(f"--forgetting: expected a finite number, got {own.forgetting}.")
    if sum(words.partition(":")[0] == SELF for words in own.general) > 1:
        parser.error("--general self: expected it once, got it several times. Leave it out but once.")
    if own.task_metric is not None and own.task_tolerance is None:
        parser.error("--task_metric: expected --task_tolerance, which it is the measure of, got none. Add it.")


def output_folder(own: argparse.Namespace) -> Path:
    """Return the full path of the folder to make, which may be there if it is to be replaced.

    Raises:
        FileExistsError: It holds something else than what `grit retain` writes, or the adapter that is read.
        NotADirectoryError: It is a file.
    """
    folder = Path(own.output).expanduser().resolve()
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not own.overwrite or not found:
        return require_free_folder(folder)
    if own.adapter is not None and folder == Path(own.adapter).expanduser().resolve():
        raise FileTakenError(
            f"--output: expected another folder than that of --adapter, got {own.output}. Choose another."
        )
    if "front.json" not in found or found - _WRITTEN:
        raise FileTakenError(
            f"--output: expected a folder that holds what `grit retain` has written and nothing else, got {folder}. Choose "
            "another."
        )
    return folder


def backbone_words(folder: str, given: str | None) -> list[str]:
    """Return the words of `grit fit` for the backbone of a plain LoRA: the one that is given, or that its folder names.

    Raises:
        FileNotFoundError: It is no folder of PEFT.
        ValueError: It holds another kind of adapter, or names no backbone.
    """
    file = Path(folder) / "adapter_config.json"
    if not Path(folder).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", folder):
        raise MissingFileError(
            f"--adapter: expected a folder, got {folder}, which does not exist. A hub id is not taken: download it first, with "
            f"`hf download {folder} --local-dir DIR`, and name that folder."
        )
    if not file.is_file():
        raise MissingFileError(
            f"--adapter: expected a folder with adapter_config.json, as PEFT writes it, got {folder}, which has none."
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidValueError(f"--adapter: expected JSON in {file}, got what cannot be read: {error}.") from error
    if settings.get("peft_type") != "LORA" or settings.get("use_dora"):
        kind = "DoRA" if settings.get("use_dora") else settings.get("peft_type")
        raise InvalidValueError(
            f"--adapter: expected a plain LoRA, whose B can be edited by itself, got a {kind} in {folder}. Choose another."
        )
    if given is not None:
        return [f"--model.backbone={given}"]
    if not settings.get("base_model_name_or_path"):
        raise InvalidValueError(
            f"--backbone: expected the model that {folder} was trained on, as its adapter_config.json names none, got none. "
            "Set it."
        )
    words = [f"--model.backbone={settings['base_model_name_or_path']}"]
    return words + ([f"--model.revision={settings['revision']}"] if settings.get("revision") else [])
