"""Trains one case as a user would, and says what came of it.

A case works if everything that a user relies on holds: finite losses, as many optimizer steps as were asked for, an adapter that
has moved, a geometry that has heard its layers, a checkpoint that gives the trained model back in another process' random state,
and, where it is asked for, an export that plain PEFT loads as the same model.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils.data import DataLoader

import grit_lightning
from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.errors import InputError
from grit_lightning.export.adapter import export_adapter
from grit_lightning.optimizers import EigenbasisAdam

from .tiny_models import VOCAB_SIZE, TinyModels

WORKS, WITHOUT_GEOMETRY, REFUSED = "works", "works without geometry", "refused"
REFUSED_LATE, CRASHES, WRONG = "refused late", "crashes", "silently wrong"
FAULTS = (REFUSED_LATE, CRASHES, WRONG)
"""Outcomes that no row should have: time is lost, or what is there is not what was asked for."""

STEPS, ROWS, TOKENS = 4, 2, 12
LEARNING_RATE = 1e-2
SHARE_OF_WHAT_WAS_LEARNT = 0.05
"""Part of the learnt change of the logits that a reloaded model may be off by; 1 if nothing was reloaded."""
LONGEST_SENTENCE = 280

Batch = dict[str, Tensor]


def lora(**settings: Any) -> LoraConfig:
    """Rank 4 on every linear layer, as most people start."""
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings))


@dataclass(frozen=True)
class Case:
    """One row of the page.

    Attributes:
        name: First cell of the row.
        backbone: Name in `tiny_models`.
        adapter: Makes the PEFT configuration.
        model: Other settings of `GritLitModule`; `optimizer` replaces the default, with and without geometry.
        trainer: Makes settings of the Trainer, callbacks among them.
        fit: What to call instead of `trainer.fit(module, loader, validation_loader)`.
        loader: Makes the training data.
        steps: Optimizer steps that are asked for.
        exports: Whether an export is a part of the case.
        needs: What must be there, or the case is skipped: `package`, or `package:attribute`.
    """

    name: str
    backbone: str = "Llama"
    adapter: Callable[[], PeftConfig] = lora
    model: Mapping[str, Any] = field(default_factory=dict)
    trainer: Callable[[], dict[str, Any]] = dict
    fit: Callable[[Trainer, GritLitModule, Any, Any], None] = lambda trainer, *rest: trainer.fit(*rest)
    loader: Callable[[], Any] = lambda: loader()
    steps: int = STEPS
    exports: bool = False
    needs: str = ""


@dataclass(frozen=True)
class Outcome:
    """The rest of the row: what came of a case, whether it can be exported, and what was said or left out."""

    status: str
    export: str = ""
    words: str = ""


class _WrongError(Exception):
    """A run went through, and what it gave is not what was asked for."""


def batches(count: int = STEPS) -> list[Batch]:
    """Rows of random tokens with padding at their end, none of it learnt."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCAB_SIZE - 8, (ROWS, TOKENS), generator=generator)  # the last ids stand for images
        real = torch.arange(TOKENS) < torch.tensor([[TOKENS], [TOKENS - 3]])
        ids = ids.masked_fill(~real, 0)
        made.append({"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)})
    return made


def loader(count: int = STEPS) -> DataLoader[Any]:
    return DataLoader(batches(count), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


# The outcome.


def outcome(case: Case, models: TinyModels, folder: Path) -> Outcome:
    """Run a case with the geometry, and where that does not work, without it."""
    first = _attempt(case, models, folder / "with", GeometryConfig(kfac_update_freq=2, kfac_min_samples=1))
    if first.status in (WORKS, WRONG):
        return first
    second = _attempt(case, models, folder / "without", None)
    if second.status == WORKS and first.status == REFUSED:
        return replace(second, status=WITHOUT_GEOMETRY, words=f"{first.words} {second.words}".strip())
    if second.status == REFUSED and first.status == REFUSED:
        return first
    status = second.status if first.status == REFUSED else first.status
    return Outcome(status, words=f"{first.words} Without geometry: {' '.join([second.status, second.words]).strip()}")


def _attempt(case: Case, models: TinyModels, folder: Path, geometry: GeometryConfig | None) -> Outcome:
    folder.mkdir(parents=True)
    trainer = None
    with _warnings_of_ours() as said:
        try:
            module, settings = _module(case, models, geometry), case.trainer()
            losses = _Losses()
            trainer = _trainer(folder, settings | {"callbacks": [*settings.get("callbacks", ()), losses]}, case.steps)
            notes = _train(case, trainer, module, losses, models, folder)
            exported, why = _export(module, folder) if case.exports else ("", "")
        except (InputError, MisconfigurationException) as error:
            late = trainer is not None and trainer.global_step > 0
            return Outcome(REFUSED_LATE if late else REFUSED, words=_sentence(str(error)))
        except _WrongError as error:
            return Outcome(WRONG, words=_sentence(str(error)))
        except Exception as error:
            return Outcome(CRASHES, words=_sentence(f"{type(error).__name__}: {error}"))
    return Outcome(WORKS, exported, " ".join([*notes, *([f"Export: {why}"] if why else []), *map(_sentence, said)]))


@contextmanager
def _warnings_of_ours() -> Iterator[list[str]]:
    """Collect what the package warns of; what libraries advise says nothing about a case."""
    said: list[str] = []
    package = str(Path(grit_lightning.__file__).parent)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
        said += dict.fromkeys(str(each.message) for each in caught if each.filename.startswith(package))


# One run.


def _module(case: Case, models: TinyModels, geometry: GeometryConfig | None) -> GritLitModule:
    torch.manual_seed(0)
    default = partial(torch.optim.AdamW if geometry is None else EigenbasisAdam, lr=LEARNING_RATE)
    settings = {"backbone": models[case.backbone], "dtype": "float32", "optimizer": default} | dict(case.model)
    return GritLitModule(adapter=case.adapter(), geometry=geometry, **settings)


def _trainer(folder: Path, settings: Mapping[str, Any], steps: int) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    machine = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return Trainer(**(machine | quiet | {"max_steps": steps, "log_every_n_steps": 1} | dict(settings)))


def _train(
    case: Case, trainer: Trainer, module: GritLitModule, losses: _Losses, models: TinyModels, folder: Path
) -> list[str]:
    """Fit, check everything that a user relies on, and return what is to be said beside 'works'."""
    case.fit(trainer, module, case.loader(), loader(1))
    _require(len(losses.values) > 0 and all(map(torch.isfinite, losses.values)), f"losses are {losses.values}")
    _require(trainer.global_step == case.steps, f"{trainer.global_step} optimizer steps instead of {case.steps}")
    notes = [*_left_out(module), *_moved(module, losses.start), *_heard(module)]
    _require_no_look_ahead(module)
    _reloads(case, trainer, module, losses.logits, models, folder)
    return notes


class _Losses(Callback):
    """Keeps every loss, and the trained parameters and the logits before the first step."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.start: dict[str, Tensor] = {}
        self.logits = torch.zeros(())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.start:  # the learning rate finder starts more than once
            self.start = {name: value.detach().clone() for name, value in _trained(pl_module)}
            self.logits = logits(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(outputs["loss"].detach())


def _trained(module: LightningModule) -> Iterator[tuple[str, torch.nn.Parameter]]:
    named = module.named_parameters()
    return ((name.replace("_orig_mod.", ""), parameter) for name, parameter in named if parameter.requires_grad)


def _require(holds: bool, found: str) -> None:
    if not holds:
        raise _WrongError(found)


def _left_out(module: GritLitModule) -> list[str]:
    """Name the weights that `all-linear` does not adapt, such as experts that are stacked into one tensor."""
    model = module.peft_model
    if getattr(module.adapter_config, "target_modules", None) != "all-linear":
        return []
    covered = tuple(name for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer))
    shared = [model.get_input_embeddings(), model.get_output_embeddings()]
    matrices = [
        name
        for name, layer in model.named_modules()
        if layer not in shared and not name.startswith(covered) and not isinstance(layer, torch.nn.Embedding)
        for weight in layer.parameters(recurse=False)
        if weight.ndim > 1
    ]
    return [f"Not adapted: {_kinds(matrices)}."] if matrices else []


def _moved(module: GritLitModule, start: Mapping[str, Tensor]) -> list[str]:
    """Check that training has changed the adapter; name the kinds of layers where it has not."""
    now = dict(_trained(module))
    still = [name for name, before in start.items() if name in now and torch.equal(before, now[name].to(before.dtype))]
    _require(len(still) < len(start), f"none of the {len(start)} trained tensors has moved")
    return [f"Not moved: {_kinds(still)} ({len(still)} of {len(start)} tensors)."] if still else []


def _heard(module: GritLitModule) -> list[str]:
    """Check that the geometry has statistics; name the kinds of layers that it leaves out or has not heard."""
    geometry = module.geometry
    if geometry is None:
        return []
    adapted = {name for name, layer in module.peft_model.named_modules() if isinstance(layer, BaseTunerLayer)}
    left_out = sorted(adapted - {name.replace("._orig_mod", "") for name in geometry.layers})
    silent = [name for name, view in geometry.layers.items() if not (view.n_samples and view.a_cov.trace() > 0)]
    deaf = [name for name, view in geometry.layers.items() if name not in silent and not view.g_cov.trace() > 0]
    _require(len(silent) < len(geometry.layers), "the geometry has statistics of no layer")
    _require(len(deaf) < len(geometry.layers), "the geometry has no gradient statistics")
    rejected = geometry.counters.get("rejected", 0)
    notes = {"No geometry for": left_out, "No statistics of": silent, "No gradient statistics of": deaf}
    said = [f"{what}: {_kinds(names)}." for what, names in notes.items() if names]
    return [*said, f"{rejected} micro-batches rejected."] if rejected else said


def _kinds(names: list[str]) -> str:
    """Shorten names of parameters or layers to the kinds of layers, each once."""
    parts = [[part for part in name.split(".") if not part.isdigit() and part not in _INNER] for name in names]
    return ", ".join(sorted({f"`{each[-1]}`" for each in parts}))


@torch.no_grad()
def _require_no_look_ahead(module: GritLitModule) -> None:
    """Check that what is said at one place does not depend on later tokens: what a causal language model is."""
    (batch,) = batches(1)
    other = batch["input_ids"].clone()
    other[:, TOKENS // 2 :] = 5
    network = module.peft_model.eval()
    one, two = (network(input_ids=ids, use_cache=False).logits[:, : TOKENS // 2] for ids in (batch["input_ids"], other))
    network.train()
    _require(torch.allclose(one.float(), two.float(), atol=1e-4), "what is predicted depends on later tokens: not a causal model")


_INNER = ("default", "weight", "lora_A", "lora_B", "base_layer", "modules_to_save")


def _reloads(
    case: Case, trainer: Trainer, module: GritLitModule, before: Tensor, models: TinyModels, folder: Path
) -> None:
    """Check that a checkpoint gives the trained model back to a new Trainer, as `grit test --ckpt_path` loads it."""
    path = folder / "last.ckpt"
    trainer.save_checkpoint(path)
    again = _module(case, models, module.geometry_config)
    torch.manual_seed(7)  # an initialisation that draws must not be drawn again
    kept = {name: value for name, value in case.trainer().items() if name in ("precision", "plugins", "strategy")}
    _trainer(folder, kept, case.steps).validate(again, loader(1), ckpt_path=path, weights_only=True, verbose=False)
    trained = logits(module)
    off, learnt = (float((other - trained).abs().max()) for other in (logits(again), before))
    _require(learnt > 0, "training has changed nothing in the logits")
    _require(off <= SHARE_OF_WHAT_WAS_LEARNT * learnt, f"the reloaded checkpoint is off by {off / learnt:.0%} of what was learnt")


@torch.no_grad()
def logits(model: GritLitModule | torch.nn.Module) -> Tensor:
    """What a model says about one batch, in evaluation mode and in the same random state."""
    network = model.peft_model if isinstance(model, GritLitModule) else model
    was_training, network = network.training, network.eval()
    (batch,) = batches(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    network.train(was_training)
    return result[batch["attention_mask"].bool()].float()


def _export(module: GritLitModule, folder: Path) -> tuple[str, str]:
    """Export as `grit export` does, and load it with PEFT alone."""
    try:
        export_adapter(folder / "last.ckpt", folder / "export")
    except InputError as error:
        return REFUSED, _sentence(str(error))
    except Exception as error:
        return CRASHES, _sentence(f"{type(error).__name__}: {error}")
    try:
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    except Exception as error:
        return WRONG, _sentence(f"PEFT cannot load it: {type(error).__name__}: {error}")
    trained, exported = logits(module), logits(loaded)
    with loaded.disable_adapter():
        off, learnt = (float((other - trained).abs().max()) for other in (exported, logits(loaded)))
    return (WORKS, "") if off <= SHARE_OF_WHAT_WAS_LEARNT * learnt else (WRONG, f"off by {off / learnt:.0%} of what was learnt.")


def _sentence(text: str) -> str:
    """Put an error into one cell: on one line, without paths of this machine, not endless."""
    line = re.sub(r"(?<![\w<])/[\w./+-]+", "…", " ".join(text.split()))
    line = re.sub(r"0x[0-9a-f]+", "0x…", line).replace("|", "\\|")
    return line if len(line) <= LONGEST_SENTENCE else line[: LONGEST_SENTENCE - 2].rstrip() + " …"
