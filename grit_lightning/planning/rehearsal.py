"""One training step without numbers: the model's own code runs on tensors that have shapes and no values.

What is alive at once is then counted, not reckoned: attention kernels, casts between dtypes, recomputed activations and the
hooks of the geometry all take part, as they would in a run on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from grit_lightning.batches import IGNORED
from grit_lightning.distributed.sharding import materialize
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.planning.live_memory import LiveMemory

CPU = torch.device("cpu")
LOGITS, OTHERS = "logits", "others"
"""Kinds of what is alive in a step."""


@dataclass(frozen=True)
class MicroBatch:
    """The shape of a micro-batch.

    Attributes:
        rows: Rows, B.
        tokens: Tokens of the longest row, T.
        prompt: Tokens before the first label of any row.
        packed: Whether rows hold several documents.
    """

    rows: int
    tokens: int
    prompt: int = 0
    packed: bool = False

    def content(self) -> dict[str, Tensor]:
        """Return a batch of this shape, of zeros; its last token is padding, as in most batches, so that masks are made."""
        ids = torch.zeros(self.rows, self.tokens, dtype=torch.int64)
        mask, labels = torch.ones_like(ids), ids.clone()
        labels[:, : self.prompt] = IGNORED
        mask[-1, -1:], labels[-1, -1:] = 0, IGNORED
        positions = {"position_ids": torch.arange(self.tokens).repeat(self.rows, 1)} if self.packed else {}
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **positions}


@contextmanager
def without_values(model: nn.Module, geometry: RankSpaceGeometry | None) -> Iterator[FakeTensorMode]:
    """Put a model from the meta device on a CPU without values: within, its forward and backward pass can be run.

    Args:
        model: The model; its tensors have no values afterwards either.
        geometry: Its geometry, or None.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        materialize(list(model.modules()), CPU)
        if geometry is not None:
            geometry.to(CPU)
        yield mode


def activation_bytes(
    model: PeftModel,
    geometry: RankSpaceGeometry | None,
    inputs: Mapping[str, Any],
    mode: FakeTensorMode,
    *,
    accumulates: bool,
    precision: AbstractContextManager[None],
) -> Counter[str]:
    """Return the bytes by kind that are alive at the peak of a forward and backward pass, beside model and geometry.

    Gradients of the adapter belong to them. Those of the step before are there until the forward pass is over, those of a
    window under way throughout.

    Args:
        model: The model, in `without_values`, as is its geometry.
        geometry: The geometry, or None.
        inputs: Of a micro-batch, see `model_inputs`; made outside of `without_values`, since they hold numbers.
        mode: From `without_values`.
        accumulates: Whether an optimizer step has several micro-batches.
        precision: In which the forward pass is run, autocast for example.
    """
    vocabulary = model.config.get_text_config().vocab_size

    def kind_of(tensor: Tensor) -> str:
        return LOGITS if tensor.ndim > 1 and tensor.shape[-1] == vocabulary else OTHERS

    inputs = {name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    token_mask = torch.ones_like(inputs["input_ids"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    memory = LiveMemory(_tensors(model), kind_of)
    with memory:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        if geometry is not None:
            geometry.start_micro_batch(token_mask, 1.0)
        with precision:
            loss = model(**inputs, use_cache=False).loss
        if not accumulates:
            for parameter in trained:
                parameter.grad = None
        loss.backward()
        if geometry is not None:
            geometry.finish_micro_batch()
        for parameter in trained:
            parameter.grad = None
    return memory.at_peak


@dataclass(frozen=True)
class UpdateMemory:
    """What an optimizer takes.

    Attributes:
        states: Bytes that it keeps from step to step.
        during: Bytes that the update allocates on top while it is under way.
    """

    states: int
    during: int


def update_bytes(optimizer: Optimizer) -> UpdateMemory | None:
    """Take a step of an optimizer and return what it allocates; None if this one cannot do without numbers.

    Args:
        optimizer: Over parameters of any device, the meta device too; they get gradients of zero for this step.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    known = [*parameters, *(parameter.grad for parameter in parameters)]
    memory = LiveMemory(known)
    try:
        with torch.no_grad(), memory:
            optimizer.step()
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        if any(not optimizer.state.get(parameter) for parameter in parameters):
            return None
    finally:
        for parameter in parameters:
            parameter.grad = None
    states = bytes_of(
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )
    return UpdateMemory(states, max(memory.peak - states, 0))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind tensors; what several share counts once."""
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
