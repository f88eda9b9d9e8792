"""Trains one case as a user would, and says what came of it.

A case works if everything that a user relies on holds: finite losses, as many optimizer steps as were asked for, an adapter
that has moved, a geometry that has heard its layers, a checkpoint that gives the trained model back whatever the random state,
and, where it is asked for, an export that plain PEFT loads as the same model.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

import grit_lightning
from grit_lightning import GeometryConfig, GritLitModule
from grit_lightning.callbacks import AdapterCheckpoint
from grit_lightning.errors import InputError
from grit_lightning.export.adapter import export_adapter
from grit_lightning.optimizers import EigenbasisAdam

from .cases import CRASHES, REFUSED, REFUSED_LATE, STEPS, WITHOUT_GEOMETRY, WORKS, WRONG, Case, Outcome, loader
from .checks import heard, left_out, moved, require_no_look_ahead
from .tiny_models import TinyModels
from .watching import Run, WrongError, logits, require

LEARNING_RATE = 1e-2
TOLERANCE = 0.05
"""Part of the learnt change of the logits that a reloaded model may be off by; 1 if nothing was reloaded."""
LONGEST_SENTENCE = 240


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
                watching.append(AdapterCheckpoint(folder, every_n_steps=1000, keep_last=10))  # and at an epoch's end
                settings["enable_checkpointing"] = True
            try:
                trainer = _trainer(folder, settings | {"callbacks": watching})
            except (ValueError, ImportError) as error:  # Lightning refuses its own settings, before it knows of ours
                return Outcome(REFUSED, words=_sentence(str(error)))
            notes = _train(run, trainer, models, folder)
    except (InputError, MisconfigurationException) as error:
        late = trainer is not None and trainer.global_step > 0
        return Outcome(REFUSED_LATE if late else REFUSED, words=_sentence(str(error)))
    except WrongError as error:
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
        "num_sanity_val_steps": 0,
    }
    machine = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return Trainer(**(machine | quiet | {"max_steps": STEPS} | dict(settings)))


def _train(run: Run, trainer: Trainer, models: TinyModels, folder: Path) -> list[str]:
    """Fit, check everything that a user relies on, and return what is to be said beside 'works'."""
    case, module = run.case, run.module
    case.fit(trainer, module, case.loader(), loader(1))
    require(len(run.losses) > 0 and all(map(torch.isfinite, run.losses)), f"the losses are {run.losses}")
    steps = trainer.global_step
    require(case.steps in (None, steps), f"{steps} optimizer steps instead of {case.steps}")
    notes = [*left_out(module), *moved(run), *heard(run)]
    case.check(run)
    require_no_look_ahead(module)
    _require_reloading(run, trainer, models, folder)
    if case.resumes:
        _require_resuming(run, models, folder)
    return notes


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
    trainer.fit(again, run.case.loader(), loader(1), ckpt_path=next(folder.glob("epoch=0-*.ckpt")), weights_only=True)
    other = Run(run.case, again).trained()
    differ = [name for name, value in run.trained().items() if not torch.equal(value, other[name])]
    require(not differ, f"after resuming, {len(differ)} of {len(other)} tensors differ from those of one run")


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
