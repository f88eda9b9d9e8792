"""`grit eval-harness`: a trained adapter through EleutherAI's lm-evaluation-harness, which does all of the evaluating."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from grit_lightning.cli.plain_parser import PlainParser
from grit_lightning.cli.run_words import named_checkpoint
from grit_lightning.errors import InvalidValueError, MissingFileError, MissingPackageError
from grit_lightning.runs.atomic import write_text
from grit_lightning.runs.folder import run_folder_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

# Models are loaded by functions that import torch themselves: help and errors can do without it.


def harness_command(words: Sequence[str]) -> None:
    """Run `grit eval-harness` with these command-line words."""
    parser = PlainParser(
        "grit eval-harness", "Evaluate a trained adapter on tasks of EleutherAI's lm-evaluation-harness."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt_path", help="Checkpoint of a run; `last` for that of the run in --config.")
    source.add_argument("--adapter", help="Folder of an exported adapter, or of any other PEFT adapter.")
    parser.add_argument("--config", action="append", default=[], help="Configuration of the run, for --ckpt_path last.")
    parser.add_argument("--backbone", help="Backbone, if not the one that the checkpoint or adapter names.")
    parser.add_argument("--tasks", required=True, nargs="+", help="Names of tasks; * stands for any letters.")
    parser.add_argument("--include_path", help="Folder with YAML files of further tasks.")
    parser.add_argument("--limit", type=int, help="Examples of each task; all if not given.")
    parser.add_argument(
        "--num_fewshot", type=int, help="Worked examples in the prompt; the task's own number if not given."
    )
    parser.add_argument(
        "--apply_chat_template", action="store_true", help="Wrap prompts in the tokenizer's chat template."
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Rows that are evaluated together.")
    parser.add_argument("--device", help="Where to evaluate; on the GPU if not given, or on the CPU if there is none.")
    parser.add_argument("--output", help="Folder for the results; the run's or the adapter's if not given.")
    given = parser.parse_args(words)
    _require_harness()
    if given.ckpt_path is not None:
        checkpoint = Path(named_checkpoint(given.ckpt_path, given.config))
        model, tokenizer = load_trained(str(checkpoint), given.backbone)
        home = run_folder_of(checkpoint) or checkpoint.parent
    else:
        model, tokenizer = load_adapter(given.adapter, given.backbone)
        home = Path(given.adapter)
    results = evaluate(
        model.to(given.device or _best_device()),
        tokenizer,
        given.tasks,
        include_path=given.include_path,
        batch_size=given.batch_size,
        limit=given.limit,
        num_fewshot=given.num_fewshot,
        apply_chat_template=given.apply_chat_template,
    )
    _report(results, Path(given.output) if given.output else home, given.tasks)


def evaluate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    batch_size: int = 8,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a model in memory.

    Args:
        model: Causal language model, on the device to use.
        tokenizer: Its tokenizer.
        tasks: Names of tasks, groups or tags, or patterns of them.
        include_path: Folder with YAML files of further tasks.
        batch_size: Rows that are evaluated together.
        **options: Further arguments of `lm_eval.simple_evaluate`.

    Returns:
        What `lm_eval.simple_evaluate` returns, without the samples.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: There is no such task.
    """
    _require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is in memory, as it should be
    manager, names = _find_tasks(tasks, include_path)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    results = simple_evaluate(model=wrapped, tasks=names, task_manager=manager, log_samples=False, **options)
    return dict(results)


def load_trained(checkpoint: str, backbone: str | None = None) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the model of a checkpoint and the tokenizer that it was trained with.

    Args:
        checkpoint: Path of a checkpoint of `GritLitModule`.
        backbone: Where its backbone is now; None for where the checkpoint says.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is no checkpoint of `GritLitModule`, names no backbone, or belongs to another one.
        OSError: The backbone cannot be read.
    """
    from grit_lightning.backbones.loading import load_tokenizer
    from grit_lightning.checkpoints.reading import model_settings
    from grit_lightning.export.card import RunNotes
    from grit_lightning.module import GritLitModule

    named = backbone or model_settings(Path(checkpoint))["backbone"]
    if not named:
        raise InvalidValueError(
            f"{checkpoint}: expected the name of a backbone in it, got none, since the model was given in memory. "
            "Set --backbone."
        )
    module = GritLitModule.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True, backbone=named)
    trained_with = None if backbone else RunNotes.beside(Path(checkpoint)).tokenizer
    return module.peft_model.eval(), load_tokenizer(trained_with or named)


def load_adapter(folder: str, backbone: str | None = None) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load an adapter as PEFT saved it, on its backbone.

    Args:
        folder: Folder with adapter_config.json.
        backbone: Where its backbone is; None for where the adapter says.

    Raises:
        FileNotFoundError: There is no adapter in the folder.
        ValueError: The adapter names no backbone.
        OSError: The backbone cannot be read.
    """
    from peft import PeftConfig, PeftModel

    from grit_lightning.backbones.loading import load_backbone, load_tokenizer

    if not (Path(folder) / "adapter_config.json").is_file():
        raise MissingFileError(
            f"--adapter: expected a folder with adapter_config.json, as `grit export` writes it, got {folder}, which has none."
        )
    named = backbone or PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not named:
        raise InvalidValueError(
            f"{folder}: expected the name of a backbone in adapter_config.json, got none. Set --backbone."
        )
    return PeftModel.from_pretrained(load_backbone(named), folder).eval(), load_tokenizer(named)


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _require_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackageError(
            "grit eval-harness: expected lm-evaluation-harness to be installed, got no such package: "
            "pip install 'grit-lightning[harness]'."
        )


def _find_tasks(patterns: Sequence[str], include_path: str | None) -> tuple[Any, list[str]]:
    """Return the index of tasks and the matching names in it; the thousands that are shipped are read only if needed."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise MissingFileError(
            f"--include_path: expected a folder with YAML files of tasks, got {include_path}, which is no folder."
        )
    missing: list[str] = []
    for shipped in (False, True) if include_path is not None else (True,):
        manager = TaskManager(include_path=include_path, include_defaults=shipped)
        missing = [pattern for pattern in patterns if not manager.match_tasks([pattern])]
        if not missing:
            return manager, manager.match_tasks(list(patterns))
    raise InvalidValueError(
        f"--tasks: expected tasks that lm-evaluation-harness knows, got {' '.join(missing)}. "
        "`lm-eval ls tasks` lists those that it ships; set --include_path to a folder with YAML files of your own."
    )


def _report(results: dict[str, Any], folder: Path, tasks: Sequence[str]) -> None:
    """Write the results, and show their table."""
    from lm_eval.utils import handle_non_serializable, make_table

    path = folder / f"harness-{'+'.join(tasks).replace('*', '_')}.json"
    write_text(path, json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")
    console = Console()
    console.print(make_table(results), markup=False, soft_wrap=True)
    console.print(str(path), style="dim", soft_wrap=True)
