"""GSM8K: grade-school mathematics with worked answers (Cobbe et al. 2021, MIT; 7,473 training, 1,319 test rows)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from grit_lightning.datamodules.base import TaskDataModule

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_RESULT = re.compile(r"^#### *\S", re.MULTILINE)


class GSM8KDataModule(TaskDataModule):
    """GSM8K for a causal language model, which learns the chain of thought and its last line, `#### <number>`.

    Reported on test; a part of the training rows becomes validation.

    Args:
        tokenizer: As for `TaskDataModule`.
        source: As for `TaskDataModule`.
        calculator_annotations: Keep the calculator annotations, such as `<<48/2=24>>`, in the answers.
        **kwargs: As for `TaskDataModule`.
    """

    hub_id, hub_config = "openai/gsm8k", "main"
    hub_splits = ("train", "test")
    test_split = "test"
    schema = ("question", "answer")
    default_template = "gsm8k"
    default_max_length = 1024
    text_metrics = ("exact_match", "rouge")

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        source: str | None = None,
        *,
        calculator_annotations: bool = True,
        **kwargs: Any,
    ) -> None:
        """Keeps the settings."""
        super().__init__(tokenizer, source, **kwargs)
        self.calculator_annotations = calculator_annotations

    def answer(self, row: Mapping[str, Any]) -> str:
        """The column `answer`, which has to end in its number."""
        text = str(row["answer"])
        if not _RESULT.search(text):
            raise ValueError(f"answer {text[-40:]!r} has no line '#### <number>'")
        return text if self.calculator_annotations else _ANNOTATION.sub("", text)

    def answer_settings(self) -> dict[str, Any]:
        """Whether annotations are kept."""
        return {"calculator_annotations": self.calculator_annotations}
