"""What the backbone still knows: its loss on held-out text and its answers to multiple-choice questions.

    text.py, choices.py, zero_shot.py    data → held-out sets
    held_out.py                          a held-out set: token sequences, and what their log-likelihoods mean
    likelihood.py                        token sequences → log-likelihoods, over all processes
    without_trace.py                     evaluating in the middle of training without leaving a trace
    change.py                            two measurements → the change, with an interval
    general_source.py                    where general text comes from, and its documents on two sides
    general_text.py, self_written.py     general text as rows, to take statistics from and to measure on

When it is measured is up to `callbacks.ForgettingProbe`.
"""

from grit_lightning.forgetting.general_source import GeneralText
from grit_lightning.forgetting.general_text import GeneralRows, read_general
from grit_lightning.forgetting.self_written import write_general
from grit_lightning.forgetting.text import TextData
from grit_lightning.forgetting.zero_shot import ZeroShotTask

__all__ = ["GeneralRows", "GeneralText", "TextData", "ZeroShotTask", "read_general", "write_general"]
