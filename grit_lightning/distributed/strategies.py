"""Training on several processes with a sharded backbone: `--trainer.strategy grit_fsdp` and `grit_fsdp2`.

The frozen backbone takes most of the memory, so the backbone is sharded. The adapter is small, and its geometry needs whole
factors: it stays whole on every process, and its gradients are averaged in one all-reduce per step. Statistics, decisions,
optimizer and checkpoints are then the same as on a single process, and a run can be resumed from its one checkpoint file
on any number of processes and under any strategy.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import FSDPPrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchmetrics import Metric
from transformers import PreTrainedModel

from grit_lightning.backbones.loading import load_backbone
from grit_lightning.backbones.shapes import empty_backbone
from grit_lightning.distributed.collectives import average_gradients, copy_from_first_process
from grit_lightning.distributed.sharding import materialize, shard_in_units
from grit_lightning.errors import InvalidValueError

SUPPORTED = ("ddp", "grit_fsdp", "grit_fsdp2")
"""Strategies for several processes, by their registered names."""
TIMEOUT = timedelta(minutes=15)
"""How long a process waits for the others before it gives up; loading a large backbone has to fit."""


def require_supported(strategy: Strategy) -> None:
    """Check that a strategy keeps the adapter whole.

    Raises:
        MisconfigurationException: If it does not; names those that do.
    """
    if isinstance(strategy, WholeAdapterStrategy):
        return
    # DeepSpeedStrategy is a DDPStrategy by inheritance only
    splits = isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy)
    if splits or not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
        raise MisconfigurationException(
            "trainer.strategy: expected one that keeps the adapter whole, as the geometry, checkpoints and export need it, got "
            f"{type(strategy).__name__}, which may split it. Set it to one of {', '.join(SUPPORTED)}, or train on one device."
        )


class WholeAdapterStrategy(ParallelStrategy):
    """Base of both sharding strategies: only the backbone is sharded, the adapter is whole and equal on every process.

    Checkpoints are ordinary Lightning checkpoints, written by rank zero. Norm clipping and AMP work as on a single process,
    since the averaged gradients are the same everywhere.
    """

    load_on_rank_zero = True
    _blocks_sync = False
    _broadcasts_backbone = False

    # Building.

    def connect(self, model: pl.LightningModule) -> None:
        """Take the module that is to be trained.

        Raises:
            MisconfigurationException: If it does not have its backbone loaded by this strategy.
        """
        if not hasattr(type(model), "peft_model"):
            raise MisconfigurationException(
                "trainer.strategy: expected ddp or one device for a module of your own, which brings its backbone whole, got "
                f"{type(self).__name__} with {type(model).__name__}. Set it to ddp, or train a GritLitModule."
            )
        super().connect(model)

    def load_backbone(self, **options: Any) -> PreTrainedModel:
        """Load the backbone on rank zero, and only its shape on every other process; a collective.

        A model that is already in memory, or that is quantised as it is read, is loaded by every process itself.

        Args:
            **options: Arguments of `backbones.load_backbone`.
        """
        shared = self.load_on_rank_zero and self.world_size > 1
        if not shared or isinstance(options["source"], PreTrainedModel) or options.get("quantization") is not None:
            return load_backbone(**options)
        self._broadcasts_backbone = True
        model = load_backbone(**options) if self.is_global_zero else None
        known = None if model is None else (model.dtype, model.generation_config)
        dtype, generation_config = self.broadcast(known)  # type: ignore[misc]
        if model is None:
            model = empty_backbone(**{**options, "dtype": dtype})
            model.generation_config = generation_config
        return model

    def share_adapter(self, model: nn.Module, fingerprint: dict[str, Any]) -> dict[str, Any]:
        """Give every process the adapter and the fingerprint of the backbone that rank zero has; a collective."""
        owners = [
            module for module in model.modules() if any(p.requires_grad for p in module.parameters(recurse=False))
        ]
        materialize(owners, torch.device("cpu"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.root_device)
        copy_from_first_process(p for p in model.parameters() if p.requires_grad)
        shared: dict[str, Any] = self.broadcast(fingerprint)
        return shared

    def _adapter(self) -> list[nn.Parameter]:
        assert self.lightning_module is not None
        return [p for p in self.lightning_module.parameters() if p.requires_grad]

    def _place_module(self) -> None:
        """Set the device of metrics and module, and have every forward pass check that the embedding is gathered.

        `LightningModule.to()` would set the device, but it is never called: sharding puts the parameters in place by itself.
        """
        module: Any = self.lightning_module
        module._device = self.root_device
        module.peft_model.get_input_embeddings().register_forward_pre_hook(_require_gathered)
        for metric in module.modules():
            if isinstance(metric, Metric):
                metric.to(self.root_device)

    # Gradients.

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Put off averaging the gradients: within an accumulation window they are averaged once, after its last micro-batch."""
        self._blocks_sync = True
        try:
            yield
        finally:
            self._blocks_sync = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the adapter's gradients over all processes, once per accumulation window."""
        super().post_backward(closure_loss)
        if not self._blocks_sync:
            average_gradients(self._adapter())

    # Precision.

    @property
    def precision_plugin(self) -> Precision:
        """The plugin of a single device, since the adapter's gradients are whole."""
        return self._precision_plugin if self._precision_plugin is not None else Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, FSDPPrecision):
            name = plugin.precision
            device = "cpu" if isinstance(self.accelerator, CPUAccelerator) else "cuda"
            if name in ("16-mixed", "bf16-mixed"):
                plugin = MixedPrecision(name, device)
            else:
                plugin = Precision() if name == "32-true" else HalfPrecision(name)  # type: ignore[arg-type]
        self._precision_plugin = plugin

    # Checkpoints.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False, as on a single device: weights are restored before the backbone is sharded."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True, as on a single device."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights of the adapter."""
        return Strategy.lightning_module_state_dict(self)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights of the adapter."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of the optimizer, whose parameters are the whole adapter."""
        return Strategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states of all optimizers."""
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write one file, on rank zero."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one file, on every process."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)


class GritFSDPStrategy(WholeAdapterStrategy, FSDPStrategy):  # type: ignore[misc]  # precision is any plugin's here
    """FSDP with a sharded backbone and a whole adapter. Also runs on CPUs.

    Every block of the network is one unit; its class need not be named. For activation checkpointing set
    `model.gradient_checkpointing`. Processes exchange weights in `model.dtype`.

    Args:
        cpu_offload: Keep the shards in CPU memory, and copy a unit to the device only while it computes.
        sharding_strategy: As in Lightning's FSDPStrategy.
        device_mesh: As in Lightning's FSDPStrategy, for HYBRID_SHARD.
        load_on_rank_zero: Read the backbone on rank zero only, and broadcast it unit by unit, so that the other processes
            never hold more than one whole unit. False lets every process read it.
        process_group_backend: nccl, gloo …; None chooses by device.
        timeout: How long a process waits for the others.
    """

    strategy_name = "grit_fsdp"

    def __init__(
        self,
        cpu_offload: bool = False,
        sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"] = "FULL_SHARD",
        device_mesh: tuple[int, int] | None = None,
        load_on_rank_zero: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        """Store the settings."""
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timeout,
            cpu_offload=cpu_offload,
            sharding_strategy=sharding_strategy,
            device_mesh=device_mesh,
        )
        self.load_on_rank_zero = load_on_rank_zero
        self._root: FullyShardedDataParallel | None = None

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wrap the blocks, then the rest; only once, even when a fit and a validation follow each other."""
        if self._root is not None and self._root.module is model:
            return self._root
        _require_unsharded(model, FullyShardedDataParallel)
        adapter = self._adapter()
        offload = self.cpu_offload.offload_params and self.root_device.type != "cpu"  # a CPU keeps them there anyway

        def wrap(module: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(
                module,
                ignored_states=adapter,
                device_id=self.root_device,
                cpu_offload=CPUOffload(offload),
                sharding_strategy=self.sharding_strategy,
                **{name: value for name, value in self.kwargs.items() if name != "auto_wrap_policy"},
            )

        shard_in_units(model, wrap, self.root_device, fill=self._broadcasts_backbone)
        self._root = root = wrap(model)  # type: ignore[assignment]
        self._place_module()
        return root


class GritFSDP2Strategy(WholeAdapterStrategy, ModelParallelStrategy):
    """FSDP2 (`fully_shard`) with a sharded backbone and a whole adapter. Also runs on CPUs.

    Args:
        cpu_offload: Keep the shards in CPU memory, and copy a unit to the device only while it computes.
        tensor_parallel_size: Must be 1; tensor parallelism is not supported.
        load_on_rank_zero: As in `GritFSDPStrategy`.
        process_group_backend: nccl, gloo …; None chooses by device.
        timeout: How long a process waits for the others.

    Raises:
        ValueError: If tensor parallelism is requested.
    """

    strategy_name = "grit_fsdp2"

    def __init__(
        self,
        cpu_offload: bool = False,
        tensor_parallel_size: int = 1,
        load_on_rank_zero: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        """Store the settings."""
        if tensor_parallel_size != 1:
            raise InvalidValueError(
                "GritFSDP2Strategy.tensor_parallel_size: expected 1, as the geometry needs the factors and activations of the "
                f"adapter whole, got {tensor_parallel_size}. Use more processes instead."
            )
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.cpu_offload = cpu_offload
        self.load_on_rank_zero = load_on_rank_zero
        self._sharded: nn.Module | None = None

    def setup_environment(self) -> None:
        """Make all processes one data-parallel group."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the blocks, then the rest; only once, even when a fit and a validation follow each other."""
        model: nn.Module = self.lightning_module.peft_model  # type: ignore[union-attr,assignment]
        if self._sharded is not model:
            _require_unsharded(model, FSDPModule)
            self._shard(model)
        super().setup(trainer)

    def _shard(self, model: nn.Module) -> None:
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if self.cpu_offload else OffloadPolicy()
        adapter = set(self._adapter())

        def wrap(module: nn.Module) -> nn.Module:
            mesh = self.device_mesh["data_parallel"]
            return fully_shard(module, mesh=mesh, offload_policy=offload, ignored_params=adapter)  # type: ignore[return-value]

        shard_in_units(model, wrap, self.root_device, fill=self._broadcasts_backbone)
        self._sharded = wrap(model)
        self._place_module()

    def model_to_device(self) -> None:
        """Do nothing: sharding has put the parameters in place."""


def _require_gathered(embedding: nn.Module, args: Any) -> None:
    """Refuse a forward pass whose embedding is still sharded."""
    weight = embedding.weight
    if isinstance(weight, DTensor) or weight.ndim != 2:
        raise RuntimeError(
            "Forward pass: expected a call inside a training or evaluation step, where embedding and head are gathered, got "
            "one outside of it. Call the LightningModule's steps instead, or set trainer.strategy to ddp."
        )


def _require_unsharded(model: nn.Module, kind: type) -> None:
    """Refuse a model that another Trainer has sharded."""
    if any(isinstance(module, kind) for module in model.modules()):
        raise MisconfigurationException(
            "GritLitModule: expected one that is not sharded yet, got one that another Trainer has sharded. Use the same "
            "Trainer for the whole run, or make a new GritLitModule."
        )


for _name, _strategy in (("grit_fsdp", GritFSDPStrategy), ("grit_fsdp2", GritFSDP2Strategy)):
    StrategyRegistry.register(_name, _strategy, description=(_strategy.__doc__ or "").partition("\n")[0])
