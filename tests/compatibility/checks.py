"""What must hold after any run, and what is to be said of layers beside 'works'."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from grit_lightning import GritLitModule

from .cases import TOKENS, batches
from .tiny_models import VOCAB_SIZE
from .watching import Run, logits_of, require

ROUNDING = 1e-6
"""By how much the float32 logits of these models differ when they should not: about 1e-7."""


def left_out(module: GritLitModule) -> list[str]:
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


def moved(run: Run) -> list[str]:
    """Check that training has changed the adapter; name the kinds of layers that no gradient reaches."""
    now = run.trained()
    require(any(not torch.equal(now[name], before) for name, before in run.start.items()), "the adapter has not moved")
    still = sorted(set(now) - run.learnt)
    return [f"No gradient: {_kinds(still)} ({len(still)} of {len(now)} tensors)."] if still else []


def heard(run: Run) -> list[str]:
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
def require_no_look_ahead(module: GritLitModule) -> None:
    """Check that what is said at one place does not depend on later tokens: what a causal language model is."""
    (batch,) = batches(1)
    other, half = batch["input_ids"].clone(), TOKENS // 2
    other[:, half:] = VOCAB_SIZE - 9
    one, two = (logits_of(module.peft_model, ids)[:, :half] for ids in (batch["input_ids"], other))
    require(torch.allclose(one, two, rtol=0, atol=ROUNDING), "predictions depend on later tokens: no causal model")


_INNER = ("default", "weight", "lora_A", "lora_B", "base_layer", "modules_to_save")
