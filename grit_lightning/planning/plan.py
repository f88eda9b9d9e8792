"""What a run takes: its layers, its memory by part on this and other devices, and its checkpoint, from shapes alone."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.seed import isolate_rng
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from grit_lightning.backbones.adapters import lacks_weights
from grit_lightning.backbones.inputs import accepted_arguments
from grit_lightning.backbones.shapes import empty_backbone
from grit_lightning.batches import model_inputs
from grit_lightning.errors import InvalidValueError
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.module import GritLitModule
from grit_lightning.optimization import build_optimizer
from grit_lightning.optimizers import GeometryAdam
from grit_lightning.planning.checkpoint_size import file_size
from grit_lightning.planning.parts import (
    Parts,
    data_parallel,
    has_blocks,
    sharded,
    unpacked_bytes,
    weight_bytes,
)
from grit_lightning.planning.rehearsal import (
    LOGITS,
    MicroBatch,
    UpdateMemory,
    activation_bytes,
    bytes_of,
    update_bytes,
    without_values,
)


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        layers: Number of adapted layers by the last part of their name.
        trainable_parameters: Parameters that are trained.
        backbone_parameters: Parameters of the backbone.
        dtype: Dtype of the backbone.
        batch: The micro-batch with the highest peak.
        logits: Bytes of logits, and of what has their shape, at that peak.
        bound: Bytes of activations of the largest micro-batch that the settings allow.
        parts: Bytes by part on one device, as the settings have it.
        placements: Bytes by part of one process, by where and how: one device, DDP, FSDP, NF4.
        checkpoint: Bytes of a checkpoint.
    """

    layers: dict[str, int]
    trainable_parameters: int
    backbone_parameters: int
    dtype: str
    batch: MicroBatch
    logits: int
    bound: int
    parts: Parts
    placements: dict[str, Parts]
    checkpoint: int


def plan_of(
    module: GritLitModule,
    batches: Sequence[MicroBatch],
    largest: MicroBatch,
    precision: Precision,
    *,
    processes: int,
    accumulates: bool,
) -> Plan:
    """Count what a run takes, without reading a weight.

    Args:
        module: The module, its model not built yet; afterwards it has one without values.
        batches: Shapes of micro-batches of the run; the one with the highest peak counts.
        largest: The largest micro-batch that the settings allow.
        precision: Lightning's plugin of the run's precision.
        processes: Processes that DDP and FSDP are reckoned for.
        accumulates: Whether an optimizer step has several micro-batches.

    Raises:
        ValueError: If backbone and adapter do not fit each other, or the adapter cannot be attached without weights.
    """
    backbone = _build(module, precision)
    model, geometry = module.peft_model, module.geometry
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    optimizer = _optimizer(module, trained)
    update = update_bytes(optimizer) or _update_with_values(module, trained)
    accepted = accepted_arguments(model)
    shapes = dict.fromkeys([*batches, largest])
    inputs = {shape: model_inputs(shape.content(), accepted, trim=module.trim_logits) for shape in shapes}
    with without_values(model, geometry) as mode:
        peaks = {
            shape: activation_bytes(
                *(model, geometry, given, mode), accumulates=accumulates, precision=precision.forward_context()
            )
            for shape, given in inputs.items()
        }
        statistics = 0 if geometry is None else _statistics_bytes(geometry)
        checkpoint = _checkpoint_bytes(module, optimizer, mode)
    batch = max(batches, key=lambda shape: peaks[shape].total())
    nf4 = module.backbone_options["quantization"] == "nf4"
    dense = Parts(
        weights=weight_bytes(backbone, nf4=False),
        adapter=bytes_of(_tensors(model)) - bytes_of(_tensors(backbone)),
        optimizer=None if update is None else update.states,
        statistics=statistics,
        activations=max(peaks[batch].total(), gradients + (0 if update is None else update.during)),
    )
    packed = _packed(dense, backbone)
    return Plan(
        layers=_adapted_layers(model),
        trainable_parameters=sum(parameter.numel() for parameter in trained),
        backbone_parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        dtype=str(backbone.dtype).removeprefix("torch."),
        batch=batch,
        logits=peaks[batch][LOGITS],
        bound=peaks[largest].total(),
        parts=packed if nf4 else dense,
        placements=_placements(dense, packed, backbone, processes, gradients, nf4),
        checkpoint=checkpoint,
    )


def _placements(
    dense: Parts, packed: Parts, backbone: PreTrainedModel, processes: int, gradients: int, nf4: bool
) -> dict[str, Parts]:
    parts = packed if nf4 else dense
    placements = {"one device": parts, f"DDP on {processes}": data_parallel(parts, gradients)}
    if has_blocks(backbone):
        placements[f"FSDP on {processes}"] = sharded(parts, backbone, processes, gradients, nf4)
    return placements | ({"one device, not quantised": dense} if nf4 else {"one device, NF4": packed})


def _packed(dense: Parts, backbone: PreTrainedModel) -> Parts:
    """Return the parts with linear layers in NF4: of all packed weights, one is unpacked while its layer computes."""
    weights = weight_bytes(backbone, nf4=True)
    return replace(dense, weights=weights, activations=dense.activations + unpacked_bytes(backbone))


def _build(module: GritLitModule, precision: Precision) -> PreTrainedModel:
    """Build the module's model on the meta device; return its backbone once more, without the adapter."""
    with isolate_rng(include_cuda=False), warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # a run gives them
        try:
            module.configure_model()
        except RuntimeError as error:
            if not lacks_weights(error):
                raise
            raise InvalidValueError(
                "model.adapter: expected one that can be attached without weights, got a "
                f"{type(module.adapter_config).__name__} that computes its start from them. Plan with another start "
                "(init_lora_weights: true), which takes as much."
            ) from error
        backbone = empty_backbone(**module.backbone_options)
    precision.convert_module(module)
    precision.convert_module(backbone)
    return backbone


def _update_with_values(module: GritLitModule, trained: Sequence[Tensor]) -> UpdateMemory | None:
    """Take the optimizer's step over zeros, for one that does not run without values; None if that fails too."""
    zeros = [nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype)) for parameter in trained]
    return update_bytes(_optimizer(module, zeros))


def _optimizer(module: GritLitModule, parameters: Sequence[Tensor]) -> Optimizer:
    optimizer = build_optimizer(module.optimizer_factory, list(parameters), module.geometry)
    if isinstance(optimizer, GeometryAdam) and module.geometry is not None:
        optimizer.bind(module.geometry)
    return optimizer


def _statistics_bytes(geometry: RankSpaceGeometry) -> int:
    kept = [*tree_leaves([group.state_dict() for group in geometry.groups])]
    under_way = [tensor for group in geometry.groups for tensor in group.statistics.micro.tensors()]
    return sum(tensor.nbytes for tensor in [*kept, *under_way] if isinstance(tensor, Tensor))


def _checkpoint_bytes(module: GritLitModule, optimizer: Optimizer, mode: FakeTensorMode) -> int:
    content = {
        "state_dict": module.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": dict(module.hparams),
    }
    module.on_save_checkpoint(content)
    return file_size(content, mode)


def _adapted_layers(model: nn.Module) -> dict[str, int]:
    names = [name for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    return dict(Counter(name.rpartition(".")[2] for name in names))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
