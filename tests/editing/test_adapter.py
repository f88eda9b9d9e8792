"""An edit acts on B alone, from B as it was found, and leaves nothing behind."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from grit_lightning.editing.adapter import EditableAdapter, edited_factor


def b_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name: module.lora_B["default"].weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def test_b_becomes_b_x_and_comes_back(adapted: PeftModel) -> None:
    editable, before = EditableAdapter(adapted), b_of(adapted)
    name = next(iter(before))
    x = torch.randn(4, 4)
    with editable.edited({name: x}):
        torch.testing.assert_close(b_of(adapted)[name], before[name] @ x)
        assert all(torch.equal(b, before[other]) for other, b in b_of(adapted).items() if other != name)
    assert all(torch.equal(b, before[other]) for other, b in b_of(adapted).items())


def test_edits_do_not_add_up(adapted: PeftModel) -> None:
    editable, before = EditableAdapter(adapted), b_of(adapted)
    half = {name: 0.5 * torch.eye(4) for name in before}
    editable.apply(half)
    editable.apply(half)
    assert all(torch.equal(b, 0.5 * before[name]) for name, b in b_of(adapted).items())


def test_an_edit_is_undone_when_measuring_fails(adapted: PeftModel) -> None:
    editable, before = EditableAdapter(adapted), b_of(adapted)
    try:
        with editable.edited({name: torch.zeros(4, 4) for name in before}):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert all(torch.equal(b, before[name]) for name, b in b_of(adapted).items())


def test_the_dtype_stays_and_the_identity_changes_no_bit() -> None:
    b = torch.randn(6, 4).bfloat16()
    assert edited_factor(b, torch.eye(4)) is b
    x = torch.eye(4) * 0.3
    edited = edited_factor(b, x)
    assert edited.dtype == torch.bfloat16
    assert torch.equal(edited, (b.float() @ x).bfloat16())  # rounded once
