"""GSM8K: grade-school mathematics with worked answers (Cobbe et al. 2021, MIT; 7,473 training, 1,319 test rows)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from grit_lightning.datamodules.base import TaskDataModule
from grit_lightning.datamodules.pipeline.published import PublishedSplit
from grit_lightning.datamodules.pipeline.task_table import Split
from grit_lightning.datamodules.pipeline.text import as_text
from grit_lightning.errors import InvalidValueError

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
    published: ClassVar[Mapping[Split, PublishedSplit]] = {  # hashes of the authors' train.jsonl and test.jsonl
        "train": PublishedSplit(
            7_473,
            {
                "question": "f60bab9a5086d2abef739138febd6bb43c68228f744c4fd677b5042166c38743",
                "answer": "3cb84350166ef58cd14fa1fc52db9a27cca7b61b91dce4e9db4b2cd45d927d4b",
            },
        ),
        "test": PublishedSplit(
            1_319,
            {
                "question": "143f3279353044f56d3b8a98a4544519821a5c9a4284225bcb1275c5c293ef48",
                "answer": "15b9f456eb1a4e6390d77dd54c424ef77620057b6cc89b88734f563a7549b8d0",
            },
        ),
    }

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        source: str | None = None,
        *,
        calculator_annotations: bool = True,
        **kwargs: Any,
    ) -> None:
        """Keep the settings."""
        super().__init__(tokenizer, source, **kwargs)
        self.calculator_annotations = calculator_annotations

    def answer(self, row: Mapping[str, Any]) -> str:
        """Return the column `answer`, which has to end in its number."""
        text = as_text(row["answer"], "answer")
        if not _RESULT.search(text):
            raise InvalidValueError(f"answer: expected a line '#### <number>', got {text[-40:]!r}")
        return text if self.calculator_annotations else _ANNOTATION.sub("", text)

    def answer_settings(self) -> dict[str, Any]:
        """Return whether annotations are kept."""
        return {"calculator_annotations": self.calculator_annotations}
