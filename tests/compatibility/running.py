"""Trains one case as a user would, and says what came of it.

A case works if everything that a user relies on holds: finite losses, as many optimizer steps as were asked for, an adapter
that has moved, a geometry that has heard its layers, a checkpoint that gives the trained model back whatever the random state,
and, where it is asked for, an export that plain PEFT loads as the same model.
"""

from __future__ import annotations

import re
import sys
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
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

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
MARKED = (5, 6)
"""Tokens that every row has, for methods that train or wait for some tokens only."""
LEARNING_RATE = 1e-2
TOLERANCE = 0.05
"""Part of the learnt change of the logits that a reloaded model may be off by; 1 if nothing was reloaded."""
ROUNDING = 1e-6
"""By how much the float32 logits of these models differ when they should not: about 1e-7."""
LONGEST_SENTENCE = 240

Batch = dict[str, Tensor]


def lora(**settings: Any) -> LoraConfig:
    """Rank 4 on every linear layer, as most people start."""
    return LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
    )


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
        steps: Optimizer steps that are asked for; None if nobody can know.
        check: Looks whether what is special about the case has happened, and raises with `require` if it has not.
        resumes: Whether a run that is stopped after its first epoch and resumed must give the same weights.
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
    steps: int | None = STEPS
    check: Callable[[Run], None] = lambda run: None
    resumes: bool = False
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
        ids = torch.randint(8, VOCAB_SIZE - 8, (ROWS, TOKENS), generator=generator)  # the last ids stand for images
        ids[:, 1:3] = torch.tensor(MARKED)
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
    also = "the same" if second.words == first.words else " ".join([second.status, second.words]).strip()
    return Outcome(status, words=f"{first.words} Without geometry: {also}")


def _attempt(case: Case, models: TinyModels, folder: Path, geometry: GeometryConfig | None) -> Outcome:
    folder.mkdir(parents=True)
    trainer = None
    try:
        with _warnings_of_ours() as said:
            module, settings = _module(case, models, geometry), case.trainer()
            run = Run(case, module)
            watching = [*settings.get("callbacks", ()), run]
            if case.resumes:
                every_epoch = {"every_n_epochs": 1, "save_top_k": -1, "save_on_train_epoch_end": True}
                watching.append(ModelCheckpoint(folder, filename="{epoch}", **every_epoch))
                settings["enable_checkpointing"] = True
            try:
                trainer = _trainer(folder, settings | {"callbacks": watching})
            except (ValueError, ImportError) as error:  # Lightning refuses its own settings, before it knows of ours
                return Outcome(REFUSED, words=_sentence(str(error)))
            notes = _train(run, trainer, models, folder)
    except (InputError, MisconfigurationException) as error:
        late = trainer is not None and trainer.global_step > 0
        return Outcome(REFUSED_LATE if late else REFUSED, words=_sentence(str(error)))
    except _WrongError as error:
        return Outcome(WRONG, words=_sentence(str(error)))
    except Exception as error:
        return Outcome(CRASHES, words=_sentence(f"{type(error).__name__}: {error}"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no tokenizer to export with the model
        exported, why = _export(run, folder) if case.exports else ("", "")
    return Outcome(WORKS, exported, " ".join([*notes, *map(_sentence, said), *([f"Export: {why}"] if why else [])]))


@contextmanager
def _warnings_of_ours() -> Iterator[list[str]]:
    """Collect what the package itself warns of; what libraries advise says nothing about a case."""
    said: list[str] = []
    package = str(Path(grit_lightning.__file__).parent)

    def listen(message: Warning | str, *_: Any, **__: Any) -> None:
        frame = sys._getframe(1)  # the warning's own file need not be where it comes from: decorators are in between
        while frame.f_back and Path(frame.f_code.co_filename).stem in ("warnings", "rank_zero"):
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(package) and str(message) not in said:
            said.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = listen
        yield said


# One run.


def _module(case: Case, models: TinyModels, geometry: GeometryConfig | None) -> GritLitModule:
    torch.manual_seed(0)
    default = partial(torch.optim.AdamW if geometry is None else EigenbasisAdam, lr=LEARNING_RATE)
    settings = {"backbone": models[case.backbone], "dtype": "float32", "optimizer": default} | dict(case.model)
    return GritLitModule(adapter=case.adapter(), geometry=geometry, **settings)


def _trainer(folder: Path, settings: Mapping[str, Any]) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    quiet["num_sanity_val_steps"] = 0
    machine = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return Trainer(**(machine | quiet | {"max_steps": STEPS} | dict(settings)))


def _train(run: Run, trainer: Trainer, models: TinyModels, folder: Path) -> list[str]:
    """Fit, check everything that a user relies on, and return what is to be said beside 'works'."""
    case, module = run.case, run.module
    case.fit(trainer, module, case.loader(), loader(1))
    require(len(run.losses) > 0 and all(map(torch.isfinite, run.losses)), f"the losses are {run.losses}")
    steps = trainer.global_step
    require(case.steps in (None, steps), f"{steps} optimizer steps instead of {case.steps}")
    notes = [*_left_out(module), *_moved(run), *_heard(run)]
    case.check(run)
    _require_no_look_ahead(module)
    _require_reloading(run, trainer, models, folder)
    if case.resumes:
        _require_resuming(run, models, folder)
    return notes


class Run(Callback):
    """Watches one run.

    Attributes:
        losses: Of every micro-batch.
        rates: Learning rates of the first group, of every optimizer step.
        learnt: Names of the trained parameters that have had a gradient other than zero.
        start: Trained parameters before the first step.
        end: Trained parameters after the last one.
        logits: What the model says before the first step.
        fits: How often training has started.
        tokens: Real tokens since it last did.
        last_rate: Learning rate after the last step.
    """

    def __init__(self, case: Case, module: GritLitModule) -> None:
        self.case, self.module = case, module
        self.losses: list[Tensor] = []
        self.rates: list[float] = []
        self.fits = self.tokens = 0
        self.last_rate = 0.0
        self.learnt: set[str] = set()
        self._tokens_of_batch = 0
        self.start: dict[str, Tensor] = {}
        self.end: dict[str, Tensor] = {}
        self.logits = torch.zeros(())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.losses, self.rates, self.tokens = (
            [],
            [],
            0,
        )  # a finder of learning rates or batch sizes may have run before
        self.fits += 1
        if not self.start:
            self.start = self.trained()
            self.logits = logits(self.module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))
        named = self.module.named_parameters()
        self.learnt |= {name for name, value in named if value.grad is not None and value.grad.any()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._tokens_of_batch = int(batch["attention_mask"].sum())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tokens += self._tokens_of_batch  # once for every evaluation: LBFGS has several in a step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())
        self.end = self.trained()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_rate = float(trainer.optimizers[0].param_groups[0]["lr"])

    def trained(self) -> dict[str, Tensor]:
        """Return a copy of the trained parameters by name."""
        return {name: value.detach().clone() for name, value in self.module.named_parameters() if value.requires_grad}


def require(holds: bool, found: str) -> None:
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


def _moved(run: Run) -> list[str]:
    """Check that training has changed the adapter; name the kinds of layers that no gradient reaches."""
    now = run.trained()
    require(any(not torch.equal(now[name], before) for name, before in run.start.items()), "the adapter has not moved")
    still = sorted(set(now) - run.learnt)
    return [f"No gradient: {_kinds(still)} ({len(still)} of {len(now)} tensors)."] if still else []


def _heard(run: Run) -> list[str]:
    """Check that the geometry has statistics; name the kinds of layers that it leaves out or has not heard."""
    geometry = run.module.geometry
    if geometry is None:
        return []
    layers = geometry.layers
    adapted = {name for name, layer in run.module.peft_model.named_modules() if isinstance(layer, BaseTunerLayer)}
    silent = [name for name, view in layers.items() if not (view.n_samples and view.a_cov.trace() > 0)]
    deaf = [name for name, view in layers.items() if name not in silent and not view.g_cov.trace() > 0]
    require(len(silent) < len(layers), "the geometry has statistics of no layer")
    require(len(deaf) < len(layers), "the geometry has no gradient statistics")
    tokens = min(view.n_samples for name, view in layers.items() if name not in silent)
    require(tokens <= run.tokens or run.fits > 1, f"statistics of {tokens} tokens, of {run.tokens} in the batches")
    kinds = {
        "No geometry for": sorted(adapted - set(layers)),
        "No statistics of": silent,
        "No gradient statistics of": deaf,
    }
    notes = [f"{what}: {_kinds(names)}." for what, names in kinds.items() if names]
    return [*notes, f"Statistics of {tokens} of {run.tokens} tokens."] if tokens < run.tokens else notes


def _kinds(names: list[str]) -> str:
    """Shorten names of parameters or layers to the kinds of layers, each once."""
    parts = [[part for part in name.split(".") if not part.isdigit() and part not in _INNER] for name in names]
    return ", ".join(sorted({f"`{each[-1]}`" for each in parts}))


@torch.no_grad()
def _require_no_look_ahead(module: GritLitModule) -> None:
    """Check that what is said at one place does not depend on later tokens: what a causal language model is."""
    (batch,) = batches(1)
    other, half = batch["input_ids"].clone(), TOKENS // 2
    other[:, half:] = VOCAB_SIZE - 9
    one, two = (logits_of(module.peft_model, ids)[:, :half] for ids in (batch["input_ids"], other))
    require(torch.allclose(one, two, rtol=0, atol=ROUNDING), "predictions depend on later tokens: no causal model")


_INNER = ("default", "weight", "lora_A", "lora_B", "base_layer", "modules_to_save")


def _require_reloading(run: Run, trainer: Trainer, models: TinyModels, folder: Path) -> None:
    """Check that a checkpoint gives the trained model back to a new Trainer, as `grit test --ckpt_path` loads it."""
    trainer.save_checkpoint(folder / "last.ckpt")
    again = _module(run.case, models, run.module.geometry_config)
    torch.manual_seed(7)  # an initialisation that draws must not be drawn again
    kept = {name: value for name, value in run.case.trainer().items() if name in ("precision", "plugins", "strategy")}
    fresh = _trainer(folder, kept)
    fresh.validate(again, loader(1), ckpt_path=folder / "last.ckpt", weights_only=True, verbose=False)
    trained = logits(run.module)
    off, learnt = (float((other - trained).abs().max()) for other in (logits(again), run.logits))
    require(learnt > 0, "training has changed nothing in the logits")
    require(off <= TOLERANCE * learnt, f"the reloaded checkpoint is off by {off / learnt:.0%} of what was learnt")


def _require_resuming(run: Run, models: TinyModels, folder: Path) -> None:
    """Check that a run that is resumed from the checkpoint of its first epoch ends with the same weights, bit for bit."""
    again = _module(run.case, models, run.module.geometry_config)
    torch.manual_seed(7)
    trainer = _trainer(folder, run.case.trainer() | {"callbacks": []})
    trainer.fit(again, run.case.loader(), loader(1), ckpt_path=folder / "epoch=0.ckpt", weights_only=True)
    other = Run(run.case, again).trained()
    differ = [name for name, value in run.trained().items() if not torch.equal(value, other[name])]
    require(not differ, f"after resuming, {len(differ)} of {len(other)} tensors differ from those of one run")


def logits(model: GritLitModule | torch.nn.Module) -> Tensor:
    """Return what a model says about the real tokens of one batch."""
    network = model.peft_model if isinstance(model, GritLitModule) else model
    (batch,) = batches(1)
    mask = batch["attention_mask"]
    return logits_of(network, batch["input_ids"], mask)[mask.bool()]


@torch.no_grad()
def logits_of(network: torch.nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return float32 logits in evaluation mode, always in the same random state, without those of virtual tokens."""
    was_training, network = network.training, network.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = network(input_ids=ids, attention_mask=mask, use_cache=False).logits
    network.train(was_training)
    return result[:, -TOKENS:].float()


def _export(run: Run, folder: Path) -> tuple[str, str]:
    """Export as `grit export` does, with and without `--merge`, and load the files with PEFT or transformers alone."""
    trained, states = logits(run.module), []
    for merge, reader in ((False, AutoPeftModelForCausalLM), (True, AutoModelForCausalLM)):
        output = folder / ("merged" if merge else "adapter")
        status, words = WORKS, ""
        try:
            export_adapter(folder / "last.ckpt", output, merge=merge)
            loaded = reader.from_pretrained(output, dtype=torch.float32)
            off, learnt = (float((other - trained).abs().max()) for other in (logits(loaded), run.logits))
            if off > TOLERANCE * learnt:
                status, words = WRONG, f"off by {off / learnt:.0%} of what was learnt."
        except InputError as error:
            status, words = REFUSED, _sentence(str(error))
        except Exception as error:
            status, words = CRASHES, _sentence(f"{type(error).__name__}: {error}")
        states.append((status, words))
    (adapter, why), (merged, why_merged) = states
    if adapter == merged:
        return adapter, why
    return f"{adapter}, merged: {merged}", " ".join([why, f"Merged: {why_merged}" if why_merged else ""]).strip()


def _sentence(text: str) -> str:
    """Put an error into one cell: what was expected and what came, on one line, without paths of this machine, not endless."""
    text = re.split(r"(?<=[\w\])'`]\.)\s+(?=[A-Z])", text.strip(), maxsplit=1)[0]
    line = re.sub(r"(?<![\w<])/[\w./+-]+", "…", " ".join(text.split()))
    line = re.sub(r"0x[0-9a-f]+", "0x…", line).replace("|", "\\|")
    return line if len(line) <= LONGEST_SENTENCE else line[: LONGEST_SENTENCE - 2].rstrip() + " …"
