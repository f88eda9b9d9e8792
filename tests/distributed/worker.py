"""The cases that two processes run for the tests of this folder, in one launch.

The helpers and the compared run are those of `benchmarks/processes.py`; `in_step.py` says how cases are kept apart.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import in_step  # type: ignore[import-not-found]
import processes as runs  # type: ignore[import-not-found]

from grit_lightning import GeometryConfig, GeometryHooks
from grit_lightning.backbones import load_backbone
from grit_lightning.callbacks import AdapterCheckpoint, RankAdaptation, Reprojection, Retention, StopOnSignal
from grit_lightning.checkpoints.adapter_state import trained_parameters
from grit_lightning.distributed import strategies
from grit_lightning.distributed.collectives import (
    average_gradients,
    copy_from_first_process,
    gather_objects,
    sum_over_processes,
)
from grit_lightning.distributed.strategies import GritFSDP2Strategy, GritFSDPStrategy
from grit_lightning.evaluation.generation import GenerationSettings, generate_answers
from grit_lightning.forgetting import TextData
from grit_lightning.forgetting.dealt_blocks import DealtBlocks
from grit_lightning.forgetting.held_out import TextBlocks
from grit_lightning.forgetting.likelihood import TokenSequence

RARE = {"kfac_update_freq": 50, "kfac_min_samples": 1}  # statistics stay apart on their processes
OFTEN = {"kfac_update_freq": 2, "kfac_min_samples": 1}
ONE_EPOCH = 3 * runs.WINDOW
KINDS = ("ddp", "fsdp", "fsdp2")
RETENTIONS = (("ddp", "at_end"), ("ddp", "penalty"), ("fsdp", "periodic"), ("fsdp", "measured"), ("fsdp2", "penalty"))


class Unfinished(pl.Callback):
    """Keeps what a checkpoint would hold in the middle of the second accumulation window."""

    state: dict[str, Any] | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if (
            trainer.global_step == 1
            and self.state is None
            and pl_module.hooks.steps.window.micro_batches == self.half(trainer)
        ):
            window = pl_module.hooks.steps.window.state_dict(trained_parameters(pl_module))
            self.state = {"geometry": pl_module.geometry.state_dict(), "window": window}

    @staticmethod
    def half(trainer: Any) -> int:
        return int(trainer.accumulate_grad_batches) // 2


def saved_and_resumed(kind: str, backbone: Path, folder: Path, epochs: int, resume: Path | None = None) -> str:
    """Train until so many epochs of three steps are over, from a checkpoint if there is one; return the path of the last."""
    pl.seed_everything(7, verbose=False)
    callbacks = [
        Reprojection("balanced", every_n_steps=4),
        RankAdaptation(every_n_steps=4, threshold=0.9, min_rank=1),
        AdapterCheckpoint(folder, every_n_steps=100),
    ]
    module = runs.make_module(backbone, OFTEN)
    trainer = runs.make_trainer(kind, callbacks=callbacks, max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(module, runs.share(runs.micro_batches(ONE_EPOCH)), ckpt_path=resume, weights_only=True)
    return str(folder / "last.ckpt")


def window(kind: str, backbone: Path) -> dict[str, Any]:
    """The state in the middle of a window, and where each process's own statistics would have been."""
    keep = Unfinished()
    pl.seed_everything(7, verbose=False)
    module = runs.make_module(backbone, RARE)
    runs.make_trainer(kind, callbacks=[keep]).fit(module, runs.share(runs.micro_batches(2 * runs.WINDOW)))
    assert keep.state is not None
    return keep.state


def brief(strategy: Any, backbone: Path, precision: Any = "32-true", **settings: Any) -> dict[str, Any]:
    """Three steps; the adapter, a covariance, and how many backbone parameters this process holds."""
    pl.seed_everything(7 + int(os.environ.get("RANK", "0")), verbose=False)  # the adapter must come from rank zero
    module = runs.make_module(backbone, OFTEN, **settings)
    trainer = runs.make_trainer("one", strategy=strategy, precision=precision)
    with mock.patch.object(strategies, "load_backbone", wraps=strategies.load_backbone) as read:
        trainer.validate(module, runs.share(runs.micro_batches(4, seed=1)), verbose=False)
    trainer.fit(module, runs.share(runs.micro_batches(ONE_EPOCH)))
    try:
        module.model.get_base_model()(**runs.micro_batches(1)[0])
        outside = ""
    except RuntimeError as error:
        outside = str(error)
    frozen = [p for p in module.parameters() if not p.requires_grad]
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in frozen)
    dtypes = {str(tensor.dtype) for group in module.geometry.groups for tensor in group.statistics.total.tensors()}
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "Σ_a": {name: view.a_cov.clone() for name, view in module.geometry.layers.items()},
        "Σ_g": {name: view.g_cov.clone() for name, view in module.geometry.layers.items()},
        "tokens": {name: view.n_samples for name, view in module.geometry.layers.items()},
        "ranks": module.geometry.ranks,
        "held": held,
        "read": read.call_count,
        "outside": outside,
        "dtypes": sorted(dtypes),
    }


class RetentionOfNumbers(Retention):
    """Retains blocks of token ids, so that no tokenizer is needed."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        generator = torch.Generator().manual_seed(11)
        blocks = [torch.randint(4, 320, (12,), generator=generator).tolist() for _ in range(10)]
        self._text = DealtBlocks([TextBlocks("numbers", [TokenSequence(ids) for ids in blocks])])


def retained(kind: str, backbone: Path, mode: str) -> dict[str, Any]:
    """Three steps with general text in between; what is left of the adapter, and the estimate of that text."""
    pl.seed_everything(7, verbose=False)
    each = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    modes: dict[str, dict[str, Any]] = {
        "at_end": {"mu": 5.0},
        "measured": {"mode": "at_end", "task_tolerance": 1e-4},
        "periodic": {"mode": "periodic", "mu": 5.0, "edit_every_n_steps": 2},
        "penalty": {"mode": "penalty", "mu": 5.0},
    }
    settings = {"every_n_steps": 1, "block_size": 12, "batch_size": each} | modes[mode]
    found = RetentionOfNumbers([TextData("numbers.txt")], **settings)
    module = runs.make_module(backbone, OFTEN)
    callbacks = [found, Reprojection("balanced", every_n_steps=2)]
    validation = runs.share(runs.micro_batches(4, seed=1)) if mode == "measured" else None
    trainer = runs.make_trainer(kind, callbacks=callbacks, check_val_every_n_epoch=5)
    trainer.fit(module, runs.share(runs.micro_batches(ONE_EPOCH)), validation)
    return {
        "mu": found.report()["retention"]["mu"],
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "Σ_g": {name: view.g_cov.clone() for name, view in found.estimate.layers.items()},
        "Σ_a": {name: view.a_cov.clone() for name, view in found.estimate.layers.items()},
        "tokens": {name: view.n_samples for name, view in found.estimate.layers.items()},
        "task tokens": {name: view.n_samples for name, view in module.geometry.layers.items()},
        "ranks": module.geometry.ranks,
    }


class Own(pl.LightningModule):
    """A module of somebody else that calls the hooks."""

    def __init__(self, backbone: Path) -> None:
        super().__init__()
        lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.model = get_peft_model(load_backbone(str(backbone), dtype="float32"), lora).train()
        self.hooks = GeometryHooks(self, self.model, GeometryConfig(**OFTEN))
        self.geometry = self.hooks.geometry

    def configure_optimizers(self) -> Any:
        return self.hooks.connect(torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.hooks.start_micro_batch(batch["attention_mask"], (batch["labels"][:, 1:] != -100).sum())
        return self.hooks.take_loss(self.model(**batch, use_cache=False).loss)

    def on_after_backward(self) -> None:
        self.hooks.on_after_backward()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.hooks.on_before_optimizer_step(optimizer)

    def on_train_end(self) -> None:
        self.hooks.on_train_end()


def own(kind: str, backbone: Path) -> dict[str, Any]:
    """Train a module of somebody else; what it has come to, or why it is refused."""
    pl.seed_everything(7, verbose=False)
    module = Own(backbone)
    callbacks = [Reprojection("balanced", every_n_steps=2), RankAdaptation(every_n_steps=2, threshold=0.9, min_rank=1)]
    try:
        runs.make_trainer(kind, callbacks=callbacks).fit(module, runs.share(runs.micro_batches(ONE_EPOCH)))
    except MisconfigurationException as error:
        return {"refused": str(error)}
    views = module.geometry.layers
    return {
        "weights": {name: p.detach().clone() for name, p in trained_parameters(module).items()},
        "Σ_a": {name: view.a_cov.clone() for name, view in views.items()},
        "Σ_g": {name: view.g_cov.clone() for name, view in views.items()},
        "ranks": module.geometry.ranks,
    }


class Numbers:
    """A tokenizer whose texts are token ids."""

    pad_token_id, name_or_path = 0, "numbers"

    def __init__(self, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, tokens))


def generated(kind: str, backbone: Path) -> list[tuple[Any, ...]]:
    """Answers to one prompt a process: six tokens; then cut where that of rank zero ends at once; then six again."""
    pl.seed_everything(7, verbose=False)
    module = runs.make_module(backbone, None)
    answers: list[Any] = []

    def test_step(batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        prompt, settings = (batch["input_ids"][:1, :5], batch["attention_mask"][:1, :5]), GenerationSettings(6)
        for _ in range(2):
            answers.extend(generate_answers(module.peft_model, Numbers(2), *prompt, settings))
            first = [int(answers[0].text.split()[0])]
            dist.broadcast_object_list(first, 0)
            answers.extend(generate_answers(module.peft_model, Numbers(first[0]), *prompt, settings))

    module.test_step = test_step
    runs.make_trainer(kind).test(module, runs.share(runs.micro_batches(2, seed=3)), verbose=False)
    return [tuple(answer) for answer in answers]


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "tied": ({}, {}, "tied"),
    "nf4, recomputed": ({}, {"quantization": "nf4", "gradient_checkpointing": True}, "backbone"),
    "bf16-mixed, offloaded": ({"cpu_offload": True}, {"precision": "bf16-mixed"}, "backbone"),
    "each reads": ({"load_on_rank_zero": False}, {}, "backbone"),
}
"""By name: arguments of the strategy, of the module (and the precision), and which backbone."""
STRATEGIES = {"fsdp": GritFSDPStrategy, "fsdp2": GritFSDP2Strategy}


def variant(name: str, kind: str, out: Path) -> dict[str, Any]:
    """A short run of a variant under a strategy, or on a single process."""
    options, settings, folder = VARIANTS[name]
    return brief(STRATEGIES[kind](**options) if kind in STRATEGIES else "auto", out / folder, **settings)


def broken(backbone: Path) -> dict[str, str]:
    """What each process says when something is wrong on rank one only."""

    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_rank == 1 and trainer.global_step == 1:
                with torch.no_grad():
                    pl_module.model.get_base_model().lm_head.weight[5] = float("nan")

    module = runs.make_module(backbone, OFTEN)
    said = ""
    try:
        runs.make_trainer("ddp", callbacks=[Poison()]).fit(module, runs.share(runs.micro_batches(ONE_EPOCH)))
    except FloatingPointError as error:
        said = str(error)
    finite = all(bool(value.isfinite().all()) for value in module.state_dict().values())
    return {"said": said, "weights": "finite" if finite else "broken"}


def asked_to_stop(backbone: Path, folder: Path) -> dict[str, Any]:
    """Where each process stops when rank one alone gets a signal in its second step, and with which exit code."""

    class Ask(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_rank == 1 and trainer.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    module = runs.make_module(backbone, OFTEN)
    callbacks = [Ask(), AdapterCheckpoint(folder, every_n_steps=100), StopOnSignal()]
    trainer = runs.make_trainer("ddp", callbacks=callbacks, enable_checkpointing=True)
    try:
        trainer.fit(module, runs.share(runs.micro_batches(ONE_EPOCH)))
    except SystemExit as stop:
        return {"code": stop.code, "step": trainer.global_step, "handler": str(signal.getsignal(signal.SIGTERM))}
    raise RuntimeError("the run has not stopped")


def collectives() -> dict[str, Any]:
    """Our collectives on values that differ between processes; one parameter is used on rank one only, one nowhere."""
    rank = dist.get_rank()
    shared, once, never = (torch.nn.Parameter(torch.zeros(size)) for size in (2, 3, 1))
    shared.grad = torch.full((2,), rank + 1.0)
    once.grad = torch.full((3,), 6.0) if rank == 1 else None
    average_gradients([shared, once, never])
    value, counts = torch.full((2,), 0.5 + rank), torch.tensor([2**34 + 1 + rank, 4095 + rank])
    sum_over_processes([value, counts])
    copied = torch.full((2,), float(rank + 7))
    copy_from_first_process([copied])
    gradients = [shared.grad, once.grad, never.grad]
    gathered = gather_objects({"rank": rank})
    return {"gradients": gradients, "sum": value, "counts": counts, "copied": copied, "gathered": gathered}


def fails(on: tuple[int, ...]) -> str:
    """A case that goes wrong on some processes, while the others wait for them."""
    if dist.get_rank() in on:
        raise ArithmeticError(f"process {dist.get_rank()} has failed")
    dist.barrier()
    return "has waited in vain"


def cases(out: Path) -> dict[str, Any]:
    """All cases by name, in the order in which they run; those that fail come first, so that all others come after them."""
    backbone, start = out / "backbone", out / "one-1" / "last.ckpt"

    def stopped_and_resumed() -> str:
        half = saved_and_resumed("fsdp", backbone, out / "begun", 1)
        return saved_and_resumed("fsdp", backbone, out / "begun", 3, resume=Path(half))

    found = {"fails on one": partial(fails, (1,)), "fails on both": partial(fails, (0, 1)), "collectives": collectives}
    for kind in KINDS:
        found[f"train-{kind}"] = partial(runs.train, kind, backbone)
        found[f"count-{kind}"] = partial(runs.count, kind, backbone)
        found[f"generated-{kind}"] = partial(generated, kind, backbone)
        found[f"resumed-{kind}"] = partial(saved_and_resumed, kind, backbone, out / f"{kind}-2", 2, resume=start)
        found[f"own-{kind}"] = partial(own, kind, backbone)
    for kind, mode in RETENTIONS:
        found[f"retained {mode}-{kind}"] = partial(retained, kind, backbone, mode)
    found["window"] = partial(window, "ddp", backbone)
    found["whole"] = partial(saved_and_resumed, "ddp", backbone, out / "whole", 3)
    found["begun"] = stopped_and_resumed
    found |= {f"{name}-{kind}": partial(variant, name, kind, out) for kind in STRATEGIES for name in VARIANTS}
    found["broken"] = partial(broken, backbone)
    found["asked to stop"] = partial(asked_to_stop, backbone, out / "asked")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    in_step.run_on_processes(2, cases(Path(sys.argv[1])), Path(sys.argv[1]))
