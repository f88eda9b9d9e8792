"""The knobs of the rank-space geometry, under the paper's names where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from grit_lightning.errors import require

CovAveraging = Literal["mean", "ema"]
DampingModeName = Literal["absolute", "relative", "batch_aware", "quantization_aware"]
PairingName = Literal["kfac", "swapped"]
SilentLayers = Literal["refuse", "leave_out"]

PRECONDITIONING = frozenset(
    {
        "kfac_damping",
        "damping_mode",
        "damping_reference_tokens",
        "trust_clip",
        "grafting",
        "pairing",
        "ng_warmup_steps",
    }
)
"""Settings that act on gradients only: an update rule with an own use of the geometry may not read them."""


@dataclass(frozen=True)
class GeometryConfig:
    """How curvature statistics are taken and used (paper, appendix A.10; SPEC names kept).

    Attributes:
        kfac_update_freq: Optimizer steps between refreshes of the damped inverses. The first refresh comes after this
            many steps of statistics; until then gradients pass unchanged.
        kfac_min_samples: Tokens a layer must have contributed before its gradients are preconditioned or its factors
            reprojected.
        kfac_damping: Tikhonov damping λ, read according to `damping_mode` (paper: 1e-3, absolute; relative damping was
            measured better at 0.1 than at 1e-3, docs/measurements.md).
        damping_mode: `absolute` adds λI (paper); `relative` adds λ·tr(Σ)/r·I, which does not depend on the gradient's
            scale (beyond the paper); `batch_aware` raises λ as the tokens of a step fall below
            `damping_reference_tokens` (paper, appendix J, M3); `quantization_aware` adds the layer's measured
            quantisation noise times the mean eigenvalue, so that what is below the noise is not trusted.
        damping_reference_tokens: Tokens per optimizer step at which `batch_aware` uses λ as it is.
        trust_clip: Largest ratio of a factor gradient's norm after to before preconditioning, applied after grafting;
            None leaves it alone.
        grafting: Give every preconditioned factor gradient the Frobenius norm of the raw one, so that damping changes
            directions only and the clipping threshold keeps its meaning (beyond the paper).
        pairing: `kfac` is ∇A ← (Σ_g+λI)⁻¹∇A, ∇B ← ∇B(Σ_a+λI)⁻¹, the only gauge-covariant choice; `swapped` is the
            pairing of the published code, for comparison.
        curvature_penalty: λ_K ≥ 0 of the curvature regulariser, ½ λ_K tr(Σ_g Σ_a) per layer; 0 is off and costs nothing.
        reprojection_penalty: λ_R ≥ 0 of the reprojection-consistency regulariser; 0 is off and costs nothing.
        penalty_warmup_steps: Optimizer steps over which both weights rise linearly from 0.
        ng_warmup_steps: Optimizer steps at the start during which gradients pass unchanged, under every update rule; None
            for all steps, so that the statistics serve reprojection and ranks only.
        cov_update_freq: Micro-batches between two that contribute statistics; 1 uses every one.
        cov_averaging: `mean` weighs every token since the start alike; `ema` forgets with `ema_beta` per optimizer step.
        ema_beta: Decay per optimizer step of the moving average, with bias correction.
        kfac_inversion_device: Where the `[layers, r, r]` factors are inverted: `cpu` (paper), or `auto` for the device
            of the statistics.
        silent_layers: What becomes of adapted layers from which no statistics can come: those that take no part in the
            loss, run outside of `lora_A`, or see only some tokens (routed experts). `refuse` names them before training
            starts; `leave_out` names them too, and trains them as a plain adapter at their full rank.

    Raises:
        ValueError: If a value is out of range; the message names the field and what it accepts.
    """

    kfac_update_freq: int = 50
    kfac_min_samples: int = 64
    kfac_damping: float = 0.1
    damping_mode: DampingModeName = "relative"
    damping_reference_tokens: int = 4096
    trust_clip: float | None = None
    grafting: bool = True
    pairing: PairingName = "kfac"
    curvature_penalty: float = 0.0
    reprojection_penalty: float = 0.0
    penalty_warmup_steps: int = 0
    ng_warmup_steps: int | None = 0
    cov_update_freq: int = 1
    cov_averaging: CovAveraging = "ema"
    ema_beta: float = 0.95
    kfac_inversion_device: Literal["cpu", "auto"] = "cpu"
    silent_layers: SilentLayers = "refuse"

    def __post_init__(self) -> None:
        """Check every field once, where it is set."""

        def check(field: str, holds: bool, expected: str) -> None:
            require("GeometryConfig", field, holds, expected, getattr(self, field))

        check("kfac_update_freq", self.kfac_update_freq >= 1, "an integer ≥ 1 (optimizer steps)")
        check("kfac_min_samples", self.kfac_min_samples >= 0, "an integer ≥ 0 (tokens)")
        check("kfac_damping", self.kfac_damping >= 0, "a number ≥ 0")
        check("curvature_penalty", self.curvature_penalty >= 0, "a number ≥ 0")
        check("reprojection_penalty", self.reprojection_penalty >= 0, "a number ≥ 0")
        check("penalty_warmup_steps", self.penalty_warmup_steps >= 0, "an integer ≥ 0 (optimizer steps)")
        check("damping_reference_tokens", self.damping_reference_tokens >= 1, "an integer ≥ 1 (tokens)")
        check("trust_clip", self.trust_clip is None or self.trust_clip > 0, "a number > 0 or null")
        warmup = self.ng_warmup_steps
        check(
            "ng_warmup_steps",
            warmup is None or warmup >= 0,
            "an integer ≥ 0 (optimizer steps), or null for all of them",
        )
        check("cov_update_freq", self.cov_update_freq >= 1, "an integer ≥ 1 (micro-batches)")
        check("ema_beta", 0.0 <= self.ema_beta < 1.0, "a number in [0, 1)")
        for name, choices in (
            ("damping_mode", get_args(DampingModeName)),
            ("pairing", get_args(PairingName)),
            ("cov_averaging", get_args(CovAveraging)),
            ("kfac_inversion_device", ("cpu", "auto")),
            ("silent_layers", get_args(SilentLayers)),
        ):
            check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")

    @property
    def decay(self) -> float:
        """Factor by which earlier statistics fade per optimizer step; 1 for the running mean."""
        return self.ema_beta if self.cov_averaging == "ema" else 1.0

    @property
    def regularised(self) -> bool:
        """Whether a regulariser is on."""
        return self.curvature_penalty > 0 or self.reprojection_penalty > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for checkpoints and records."""
        return dict(self.__dict__)
