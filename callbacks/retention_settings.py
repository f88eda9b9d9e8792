"""What of the settings of `Retention` cannot be, does nothing beside others, or would make a measurement look too good."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from grit_lightning import functional as F
from grit_lightning.callbacks.forgetting import ForgettingProbe
from grit_lightning.callbacks.rank_adaptation import RankAdaptation
from grit_lightning.callbacks.reprojection import Reprojection
from grit_lightning.errors import InvalidValueError, require
from grit_lightning.forgetting.dealt_blocks import DealtBlocks
from grit_lightning.forgetting.text import TextData

OWNER = "Retention"  # of the settings, in messages


def require_texts(texts: Sequence[TextData], weights: Mapping[str, float]) -> None:
    """Check that there is general text, and that weights belong to it.

    Raises:
        ValueError: If there is none, two have the same name, or a weight is of no text or out of range.
    """
    names = [text.label for text in texts]
    if not names:
        raise InvalidValueError("Retention.texts: expected general text, got none. Name at least one file or hub id.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidValueError(
            f"Retention.texts: expected different names, got several called {', '.join(twice)}. Set `name`."
        )
    require(OWNER, "weights", weights.keys() <= set(names), f"names among {', '.join(names)}", weights)
    finite = all(0.0 <= weight < float("inf") for weight in weights.values())
    some = any(weights.get(name, 1.0) > 0 for name in names)
    require(OWNER, "weights", finite and some, "numbers ≥ 0, one of them above 0", weights)


def orders_directions(callback: Callback) -> bool:
    """Say whether a callback puts directions in an order that Σ_g has a part in."""
    if isinstance(callback, Reprojection):
        return callback.mode is not F.ReprojectionMode.ONE_SIDED
    return isinstance(callback, RankAdaptation) and callback.rule != "energy"


def warn_of_shared_documents(text: DealtBlocks, others: Iterable[Callback]) -> None:
    """Say which probes measure the text that is retained, whatever it is called there and however it is cut."""
    for probe in (other for other in others if isinstance(other, ForgettingProbe)):
        for held_out in probe.text_blocks:
            if shared := text.shared_with(held_out):
                rank_zero_warn(
                    f"Retention.texts: expected other documents than those that ForgettingProbe measures, got {shared} of the "
                    f"{len(held_out.sequences)} blocks of {held_out.name} in both, of which it will report too good a result. "
                    "Set another split or source for one of the two."
                )
