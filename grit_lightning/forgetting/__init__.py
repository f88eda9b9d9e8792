"""What the backbone still knows: its loss on held-out text and its answers to multiple-choice questions.

    text.py, choices.py, zero_shot.py    data → probes: token sequences, and what their log-likelihoods mean
    likelihood.py                        token sequences → log-likelihoods, over all processes
    undisturbed.py                       measuring in the middle of training without leaving a trace
    change.py                            two measurements → the change, with an interval

When it is measured is up to `callbacks.ForgettingProbe`.
"""

from grit_lightning.forgetting.text import TextData
from grit_lightning.forgetting.zero_shot import ZeroShotTask

__all__ = ["TextData", "ZeroShotTask"]
