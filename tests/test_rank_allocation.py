"""AdaLoRA: its allocator is called at every optimizer step, and a resumed run goes on as the uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from peft import AdaLoraConfig, AdamssConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

from grit_lightning import GritLitModule
from grit_lightning.rank_allocation import RankAllocation

STEPS = 8
TARGETS = ["q_proj", "v_proj"]
KINDS = ("importance", "uncertainty")


@pytest.fixture
def module(make_tiny_llama: Callable[..., Any]) -> Callable[..., GritLitModule]:
    """A factory: four layers of rank 4 that AdaLoRA brings down to 2 on average, between steps 2 and 6."""

    def make(**overrides: Any) -> GritLitModule:
        settings = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": STEPS, "target_modules": TARGETS}
        torch.manual_seed(2)
        adapter = AdaLoraConfig(**(settings | overrides), task_type="CAUSAL_LM")
        return GritLitModule(make_tiny_llama(), adapter, geometry=None, lr_scheduler=None)

    return make


@pytest.fixture
def fit(tmp_path: Path, random_batch: Callable[..., dict[str, Tensor]]) -> Callable[..., None]:
    """Trains on two micro-batches a step: all different, or `same` ones, so that a resumed run may begin the data anew."""

    def run(module: GritLitModule, ckpt_path: Path | None = None, same: bool = False, **overrides: Any) -> None:
        batches: Any = [random_batch(length=8, seed=0 if same else seed) for seed in range(2 * STEPS)]
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "accumulate_grad_batches": 2,
            "default_root_dir": tmp_path,
        }
        settings |= {"limit_val_batches": 1, "num_sanity_val_steps": 0}
        trainer = pl.Trainer(**(settings | quiet | overrides))
        loader: Any = DataLoader(batches, batch_size=None)
        trainer.fit(module, loader, loader, ckpt_path=ckpt_path, weights_only=True)

    return run


def ranks(module: GritLitModule) -> list[int]:
    """Singular values of each layer that are not zero."""
    return [int(p.count_nonzero()) for name, p in module.peft_model.named_parameters() if ".lora_E." in name]


class Ranks(Callback):
    """Sum of the ranks after every optimizer step."""

    def __init__(self) -> None:
        self.sums: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.sums):
            self.sums.append(sum(ranks(pl_module)))


def test_ranks_fall_to_their_target_and_stay_there(module: Callable[..., Any], fit: Callable[..., Any]) -> None:
    given, seen = module(), Ranks()
    fit(given, callbacks=[seen])
    assert seen.sums[0] == 16
    assert seen.sums == sorted(seen.sums, reverse=True)
    assert seen.sums[5:] == [8, 8, 8]  # from step total_step − tfinal on
    assert len(set(ranks(given))) > 1  # some layers have got more than others


def test_the_allocator_sees_what_a_plain_loop_of_peft_shows_it(
    module: Callable[..., Any],
    fit: Callable[..., Any],
    make_tiny_llama: Callable[..., Any],
    random_batch: Callable[..., dict[str, Tensor]],
) -> None:
    given = module()
    given.configure_model()
    start = {name: p.detach().clone() for name, p in given.peft_model.named_parameters() if p.requires_grad}
    fit(given)
    model = get_peft_model(make_tiny_llama(), given.adapter_config).train()
    model.load_state_dict(start, strict=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in range(STEPS):
        for micro_batch in range(2):
            (model(**random_batch(length=8, seed=2 * step + micro_batch)).loss / 2).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    found = dict(given.peft_model.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:You're resuming")
@pytest.mark.parametrize("saved_at", [3, 7])
def test_a_resumed_run_allocates_to_the_bit(
    module: Callable[..., Any], fit: Callable[..., Any], tmp_path: Path, saved_at: int
) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == saved_at:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    class Importances(Callback):
        found: dict[str, Tensor]

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 5:  # before the last allocation, which forgets them
                state = pl_module.hooks.steps.allocation.state_dict()
                self.found = {f"{kind} {name}": value.clone() for kind in KINDS for name, value in state[kind].items()}

    whole, resumed, kept = module(deltaT=2), module(deltaT=2), [Importances(), Importances()]
    fit(whole, same=True, callbacks=[Save(), kept[0]])
    fit(resumed, same=True, callbacks=[kept[1]], ckpt_path=tmp_path / "half.ckpt")
    if saved_at < 5:
        assert len(kept[0].found) == len(kept[1].found) == 2 * 3 * 4  # of A, B and the singular values of four layers
        assert all(torch.equal(value, kept[1].found[name]) for name, value in kept[0].found.items())
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert ranks(whole) == ranks(resumed)
    assert (
        whole.hooks.steps.allocation.state_dict()["rank_pattern"]
        == resumed.hooks.steps.allocation.state_dict()["rank_pattern"]
    )


@pytest.mark.filterwarnings("ignore:.*max_steps")
def test_a_run_too_short_for_the_ranks_is_refused(module: Callable[..., Any], fit: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=rf"adapter\.total_step: expected at most the {STEPS} optimizer steps .*got 9"):
        fit(module(total_step=9))


def test_a_checkpoint_without_the_allocators_state_is_refused(module: Callable[..., Any]) -> None:
    given = module()
    given.configure_model()
    with pytest.raises(ValueError, match="Checkpoint: expected the state of AdaLoRA's allocator, got none"):
        given.hooks.steps.allocation.load_state_dict(None)


def test_adamss_that_freezes_parameters_while_training_is_refused(make_tiny_llama: Callable[..., Any]) -> None:
    settings: dict[str, Any] = {"r": 4, "num_subspaces": 2, "subspace_rank": 1, "target_modules": ["q_proj"]}
    choosing = AdamssConfig(
        **settings, use_asa=True, asa_target_subspaces=2, init_warmup=1, final_warmup=4, mask_interval=1
    )
    with pytest.raises(ValueError, match=r"adapter\.use_asa: expected false"):
        GritLitModule(make_tiny_llama(), choosing, geometry=None).configure_model()


def test_other_adapters_have_no_allocation(
    make_tiny_llama: Callable[..., Any], lora_config: Callable[..., Any]
) -> None:
    assert RankAllocation.of(get_peft_model(make_tiny_llama(), lora_config())) is None
