"""Editing a trained adapter: B ← B X, a small X `[r, r]` for each layer, chosen by statistics and judged by measuring.

    rows.py          what is read: encoded rows, of a task or of general text
    statistics.py    rows → Σ_a, Σ_g and E[g aᵀ] of every layer
    methods.py       two statistics and a strength → X of every layer
    adapter.py       X → the model, and back
    measuring.py     the model → nats of held-out rows, changes with intervals
    front.py         few strengths, measured, and the best of them for what was asked

Files come in (`export.opening`) and go out (`export.retention`) elsewhere.
"""

from grit_lightning.editing.front import Front, FrontPoint, Target
from grit_lightning.editing.measuring import Change, HeldOut
from grit_lightning.editing.methods import METHODS
from grit_lightning.editing.statistics import AdapterStatistics, measure_statistics

__all__ = [
    "METHODS",
    "AdapterStatistics",
    "Change",
    "Front",
    "FrontPoint",
    "HeldOut",
    "Target",
    "measure_statistics",
]
