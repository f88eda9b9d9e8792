"""Optimizers that take their curvature from the geometry, instead of being handed preconditioned gradients.

`GritLitModule` binds them to its geometry and then leaves gradients raw. LightningCLI injects them like any optimizer:

    optimizer: {class_path: EigenbasisAdam, init_args: {lr: 3.0e-3}}

Both act on A `[r, d_in]` from the left and on B `[d_out, r]` from the right; parameters that are no LoRA factor, and all
during the geometry's `ng_warmup_steps`, get AdamW. Moments are float32 or better, whatever the parameters are.
Beyond the paper.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from grit_lightning import functional as F
from grit_lightning.errors import InvalidValueError
from grit_lightning.geometry.derived import Derived
from grit_lightning.geometry.moments import carry_moments
from grit_lightning.geometry.rank_group import RankGroup
from grit_lightning.geometry.rank_space import RankSpaceGeometry
from grit_lightning.geometry.sites import Side

Location = tuple[RankGroup, Side, int]
"""Where a factor is: its group, its side, its layer's index in the group."""
RankMap = Callable[[RankGroup, Side], Tensor]
"""Maps `[L, r, r]` of all layers of a group, for one side."""
SIDES: tuple[Side, Side] = ("a", "b")
_CHANGED = -1
"""Version of a basis that no refresh has made: coordinates have changed since."""


class GeometryAdam(Optimizer):
    """AdamW whose moments or direction live in the geometry of the adapter; base of the two rules below.

    Args:
        params: Trainable parameters.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.

    Raises:
        ValueError: If a setting is out of range.
    """

    needs_bases: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset()
    """Settings of `GeometryConfig`, out of its `PRECONDITIONING`, that change the steps of this rule."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        """Check the settings; the geometry comes later, with `bind`."""
        name = type(self).__name__
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise InvalidValueError(f"{name}: expected lr, eps and weight_decay ≥ 0, got {lr}, {eps}, {weight_decay}.")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise InvalidValueError(f"{name}.betas: expected numbers in [0, 1), got {betas}.")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self._geometry: RankSpaceGeometry | None = None
        self._where: dict[Tensor, Location] = {}
        self._in_force: dict[int, Derived] = {}  # by the id of the group, during a step

    def bind(self, geometry: RankSpaceGeometry) -> None:
        """Connect to the geometry whose factors are among the parameters."""
        self._geometry = geometry
        geometry.compute_bases = geometry.compute_bases or self.needs_bases
        self._where = {
            factor: (group, side, index)
            for group in geometry.groups
            for side in SIDES
            for index, factor in enumerate(group.factors(side))
        }

    def change_coordinates(self, group: RankGroup, maps: F.ReprojectionMaps) -> None:
        """Carry the moments of the factors of all layers of `group` through a reprojection, in place.

        Args:
            group: Layers that were reprojected.
            maps: Their maps `[L, r, r]`.
        """
        carry_moments(self, group, maps)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep every tensor in its own precision: torch casts state to the dtype of the parameter."""
        super().load_state_dict(state_dict)
        ids = (key for group in state_dict["param_groups"] for key in group["params"])
        parameters = (p for group in self.param_groups for p in group["params"])
        for key, p in zip(ids, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if torch.is_tensor(value) and value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.to(self.state[p][name].device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Raises:
            RuntimeError: If no geometry is bound.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._geometry is None:
            raise RuntimeError(
                f"{type(self).__name__}: expected a rank-space geometry, got none. Use it in a GritLitModule with `geometry` "
                "set, or call bind()."
            )
        self._in_force = {id(group): self._geometry.in_force(group) for group in self._geometry.groups}
        for settings in self.param_groups:
            parameters = [p for p in settings["params"] if p.grad is not None]
            if parameters:
                self._step(parameters, settings)
        return loss

    def _step(self, parameters: list[Tensor], settings: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(F.working(p)),
                    "exp_avg_sq": torch.zeros_like(F.working(p)),
                }
            self.state[p]["step"] += 1
        updates = self._updates(parameters, settings)
        new = [F.working(p) for p in parameters]  # the parameters themselves, unless they are in half precision
        torch._foreach_mul_(new, 1.0 - settings["lr"] * settings["weight_decay"])
        torch._foreach_add_(new, self._mapped(parameters, updates, _kept), alpha=-settings["lr"])
        for p, value in zip(parameters, new, strict=True):
            if value is not p:
                p.copy_(value)

    @abstractmethod
    def _updates(self, parameters: list[Tensor], settings: dict[str, Any]) -> list[Tensor]:
        """Take the gradients into the moments; return what to subtract, times the learning rate."""

    def _adam(self, parameters: list[Tensor], gradients: list[Tensor], settings: dict[str, Any]) -> list[Tensor]:
        """Update both moments with `gradients`; return the bias-corrected Adam updates in the same coordinates."""
        beta1, beta2 = settings["betas"]
        first = [self.state[p]["exp_avg"] for p in parameters]
        second = [self.state[p]["exp_avg_sq"] for p in parameters]
        torch._foreach_lerp_(first, gradients, 1.0 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1.0 - beta2)
        steps = [float(self.state[p]["step"]) for p in parameters]
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, [(1.0 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(denominators, settings["eps"])
        updates = torch._foreach_div(first, denominators)
        torch._foreach_div_(updates, [1.0 - beta1**step for step in steps])
        return list(updates)

    def _mapped(self, parameters: list[Tensor], tensors: list[Tensor], rank_map: RankMap) -> list[Tensor]:
        """Apply M of every factor's layer to its rank axis: M t for A, t Mᵀ for B; one batched call a shape."""
        result = list(tensors)
        buckets: dict[tuple[int, Side, torch.Size], list[tuple[int, Location]]] = defaultdict(list)
        for position, p in enumerate(parameters):
            if p in self._where:
                group, side, _ = location = self._where[p]
                buckets[id(group), side, p.shape].append((position, location))
        for (_, side, _), members in buckets.items():
            group = members[0][1][0]
            maps = rank_map(group, side)[torch.tensor([index for _, (_, _, index) in members])]
            stack = torch.stack([tensors[position] for position, _ in members])
            mapped = maps.to(stack.dtype) @ stack if side == "a" else stack @ maps.to(stack.dtype).mT
            for (position, _), tensor in zip(members, mapped.unbind(0), strict=True):
                result[position] = tensor
        return result


class EigenbasisAdam(GeometryAdam):
    """Adam in the eigenbasis of the Kronecker factors: SOAP (arXiv 2409.11321) confined to rank space.

    ∇A is rotated by the eigenvectors of Σ_g and ∇B by those of Σ_a, Adam runs there, and the update is rotated back. When
    the geometry refreshes its bases, first moments follow the rotation exactly and second moments its square. Before the
    first refresh the bases are the identity and this is AdamW.
    """

    needs_bases = True
    reads = frozenset({"ng_warmup_steps"})

    def _updates(self, parameters: list[Tensor], settings: dict[str, Any]) -> list[Tensor]:
        self._follow_bases(parameters)
        rotated = self._mapped(parameters, [_gradient(p) for p in parameters], lambda *at: self._basis(*at).mT)
        return self._mapped(parameters, self._adam(parameters, rotated, settings), self._basis)

    @torch.no_grad()
    def change_coordinates(self, group: RankGroup, maps: F.ReprojectionMaps) -> None:
        """Move the bases that the moments are kept in; the moments themselves stay as they are until the next step.

        Args:
            group: Layers that were reprojected.
            maps: Their maps `[L, r, r]`.
        """
        of_a, of_b = F.gradient_maps(maps)
        for side, change in zip(SIDES, (of_a, of_b.mT), strict=True):
            for index, factor in enumerate(group.factors(side)):
                state = self.state.get(factor)
                if state:  # before its first step a factor has no moments
                    state["basis"], state["version"] = change[index] @ state["basis"], _CHANGED

    def _follow_bases(self, parameters: list[Tensor]) -> None:
        """Bring moments that were kept in other bases to the current ones."""
        moved = []
        for p in parameters:
            if p not in self._where:
                continue
            group, side, index = self._where[p]
            state = self.state[p]
            version = self._in_force[id(group)].version
            if "basis" not in state:
                state["basis"], state["version"] = self._basis(group, side)[index].clone(), version
            elif state["version"] != version:
                moved.append(p)
        for p in moved:
            group, side, index = self._where[p]
            state = self.state[p]
            basis = self._basis(group, side)[index]
            rotation = basis.mT @ state["basis"]
            for name, matrix in (("exp_avg", rotation), ("exp_avg_sq", rotation.square())):
                matrix = matrix.to(state[name].dtype)
                state[name] = matrix @ state[name] if side == "a" else state[name] @ matrix.mT
            state["basis"], state["version"] = basis.clone(), self._in_force[id(group)].version

    def _basis(self, group: RankGroup, side: Side) -> Tensor:
        derived = self._in_force[id(group)]
        return derived.g_basis if side == "a" else derived.a_basis


class NaturalAdam(GeometryAdam):
    """The K-FAC direction of the momentum, with the length of Adam's update for the same factor.

    d = (Σ_g + λI)⁻¹ m_A and m_B (Σ_a + λI)⁻¹ with m the averaged gradient; the step is d·‖Adam‖/‖d‖ per factor. Before
    the first refresh, and wherever d is not finite, the step is Adam's.
    """

    reads = frozenset({"kfac_damping", "damping_mode", "damping_reference_tokens", "ng_warmup_steps"})

    def _updates(self, parameters: list[Tensor], settings: dict[str, Any]) -> list[Tensor]:
        adam = self._adam(parameters, [_gradient(p) for p in parameters], settings)
        natural = self._mapped(parameters, [self.state[p]["exp_avg"] for p in parameters], self._inverse)
        # one transfer a group, none a layer
        ready = {key: derived.ready.tolist() for key, derived in self._in_force.items()}
        use = [p in self._where and ready[id(self._where[p][0])][self._where[p][2]] for p in parameters]
        lengths, norms = torch._foreach_norm(adam), torch._foreach_norm(natural)
        updates = []
        for fallback, direction, length, norm, chosen in zip(adam, natural, lengths, norms, use, strict=True):
            usable = norm.isfinite() & (norm > 0)
            scaled = direction * (length / norm)
            updates.append(torch.where(usable, scaled, fallback) if chosen else fallback)
        return updates

    def _inverse(self, group: RankGroup, side: Side) -> Tensor:
        derived = self._in_force[id(group)]
        return derived.g_inverse if side == "a" else derived.a_inverse


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return F.working(p.grad)


def _kept(group: RankGroup, side: Side) -> Tensor:
    return torch.diag_embed(group.kept.float())
