"""The adapter of a model under an edit: B ← B X in every layer, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from grit_lightning.errors import InvalidValueError
from grit_lightning.geometry.sites import LoraSite, find_lora_sites

Maps = Mapping[str, Tensor]
"""X `[r, r]` by the layer's name in the model. A layer that is not named stays as it is."""


def edited_factor(b: Tensor, x: Tensor) -> Tensor:
    """Return B X `[d_out, r]` in B's dtype, computed in float32 or better; B itself where X is the identity to the bit."""
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    if torch.equal(x, identity):
        return b
    dtype = torch.promote_types(torch.promote_types(b.dtype, x.dtype), torch.float32)
    return (b.to(dtype) @ x.to(device=b.device, dtype=dtype)).to(b.dtype)


class EditableAdapter:
    """Puts edits of a trained LoRA into its model, one at a time; each acts on B as it was found.

    Args:
        model: A PEFT model with one active LoRA adapter, switched on and not merged.
        written: Dtype in which B of a layer will be written, by the layer's name, so that what is measured is what is written;
            the model's own where there is none.

    Attributes:
        ranks: Rank of every layer, by name.

    Raises:
        ValueError: If the adapter is no plain LoRA, merged, or switched off.
    """

    def __init__(self, model: PeftModel, written: Mapping[str, torch.dtype] | None = None) -> None:
        """Remember B of every layer."""
        self.model, self._written = model, dict(written or {})
        self._sites = {site.name: site for site in _editable_sites(model)}
        self._found = {name: site.up.weight.detach().clone() for name, site in self._sites.items()}
        self.ranks = {name: site.r for name, site in self._sites.items()}

    @contextmanager
    def edited(self, maps: Maps) -> Iterator[None]:
        """Have the edit in the model for a while."""
        try:
            self.apply(maps)
            yield
        finally:
            self.apply({})

    @torch.no_grad()
    def apply(self, maps: Maps) -> None:
        """Set B to B₀ X in every layer, B₀ as it was found."""
        for name, site in self._sites.items():
            found = self._found[name]
            as_written = found.to(self._written.get(name, found.dtype))
            site.up.weight.copy_(edited_factor(as_written, maps[name]) if name in maps else found)


def _editable_sites(model: PeftModel) -> list[LoraSite]:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(layer.merged or layer.disable_adapters for layer in layers):
        raise InvalidValueError(
            "--adapter: expected an adapter that is switched on and not merged into the backbone, got another. Call "
            "model.unmerge_adapter() or model.enable_adapter_layers() first."
        )
    try:
        return find_lora_sites(model)
    except InvalidValueError as error:
        reason = str(error).partition(". ")[0]
        raise InvalidValueError(
            f"--adapter: expected one plain LoRA of linear layers, whose B can be edited. {reason}."
        ) from error
