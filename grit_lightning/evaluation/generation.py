"""Answers of a causal language model to prompts: transformers' own decoding, the same for any batch and padding.

Shapes: B rows, P tokens of the longest prompt, N ≤ max_new_tokens generated tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from grit_lightning.backbones.inputs import require_context
from grit_lightning.errors import InvalidValueError, require

Stage = Literal["val", "test", "predict"]


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated in evaluation. A model's own generation settings (sampling, penalties) do not apply.

    Attributes:
        max_new_tokens: Tokens after which an answer is cut off.
        do_sample: Draw tokens at random; False always takes the most likely one (greedy).
        temperature: Divides the logits before a draw.
        top_p: A draw considers only the most likely tokens that together have this probability.
        stop_strings: Texts that end an answer and are cut off from it; end-of-sequence tokens always end one.
        batch_size: Rows that are generated together; None for all of an evaluation batch.
        max_rows: Generate for the first rows of a split only; None for all. Losses and closed answers are not limited.
        stages: When to generate: `val`, `test`, `predict`.
        seed: Seed of sampled answers, which also depend on the rows that are generated together.
        bertscore_encoder: Hub id or folder of the encoder of BERTScore, where a task is scored by it; None leaves
            BERTScore out.
        bertscore_layer: Hidden layer of that encoder; 17 is bert-score's own choice for its default, roberta-large.

    Raises:
        ValueError: If a value is out of range; the message names the field and what it accepts.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 0.2
    top_p: float = 0.95
    stop_strings: tuple[str, ...] = ()
    batch_size: int | None = None
    max_rows: int | None = None
    stages: tuple[Stage, ...] = ("test", "predict")
    seed: int = 42
    bertscore_encoder: str | None = "FacebookAI/roberta-large"
    bertscore_layer: int = 17

    def __post_init__(self) -> None:
        """Check every field once, where it is set."""

        def check(field: str, holds: bool, expected: str) -> None:
            require("GenerationSettings", field, holds, expected, getattr(self, field))

        check("max_new_tokens", self.max_new_tokens >= 1, "an integer ≥ 1")
        check("temperature", self.temperature > 0, "a number > 0 (do_sample: false is greedy)")
        check("top_p", 0 < self.top_p <= 1, "a number in (0, 1]")
        check("stop_strings", all(self.stop_strings), "texts that are not empty")
        check("batch_size", self.batch_size is None or self.batch_size >= 1, "an integer ≥ 1 or null")
        check("max_rows", self.max_rows is None or self.max_rows >= 1, "an integer ≥ 1 or null")
        check("stages", set(self.stages) <= set(get_args(Stage)), f"any of {', '.join(get_args(Stage))}")
        check("bertscore_layer", self.bertscore_layer >= 1, "an integer ≥ 1")


class Answer(NamedTuple):
    """What a model said.

    Attributes:
        text: The answer without special tokens, surrounding white space, and the stop string.
        finished: Whether the answer ended by itself and was not cut off at `max_new_tokens`.
    """

    text: str
    finished: bool


@torch.no_grad()
def generate_answers(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Tensor,
    mask: Tensor,
    settings: GenerationSettings,
    seed: int | None = None,
    stop_ids: Sequence[int] = (),
) -> list[Answer]:
    """Continue prompts, leaving training mode, caches and random numbers as they were.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer; one without a padding token will do.
        prompts: int64 `[B, P]`, padded on the left with any token.
        mask: `[B, P]`, 1 for real tokens.
        settings: How answers are generated.
        seed: Seed of the draws, instead of `settings.seed`.
        stop_ids: More tokens that end an answer, such as the end of a turn of the chat template.

    Returns:
        B answers.

    Raises:
        ValueError: If a prompt is empty, or leaves no room for `max_new_tokens` in the model's context; or if the tokenizer
            has no token that ends a text.
    """
    require_room_for_answers(model, int(mask.sum(-1).max()), settings.max_new_tokens)
    if not bool(mask.any(-1).all()):
        raise InvalidValueError(
            "Prompts: expected at least one token in each, got a prompt without any. Check the template (data.template) and "
            "the columns of the row."
        )
    ends = _end_ids(model, tokenizer, stop_ids)
    config = _decoding(settings, ends, tokenizer.pad_token_id)
    answers: list[Answer] = []
    if isinstance(model, FSDPModule):
        model.unshard()  # embedding and head: `generate` goes past the root, whose own call would gather them
    with isolate_rng(), _evaluating(model):
        torch.manual_seed(settings.seed if seed is None else seed)
        for ids, real in zip(
            *(part.split(settings.batch_size or len(prompts)) for part in (prompts, mask)), strict=True
        ):
            first = int(real.any(0).int().argmax())  # columns that are padding in all rows of this part
            sequences = model.generate(
                input_ids=ids[:, first:],
                attention_mask=real[:, first:],
                generation_config=config,
                tokenizer=tokenizer,  # for the stop strings
            )
            new = sequences[:, ids.shape[1] - first :].tolist()
            answers += [_answer(tokens, tokenizer, ends, settings.stop_strings) for tokens in new]
    return answers


def require_room_for_answers(model: PeftModel | PreTrainedModel, prompt_length: int, max_new_tokens: int) -> None:
    """Check that a prompt and its answer fit the model's context.

    Raises:
        ValueError: If they do not; names the settings to change.
    """
    what = f"a prompt of {prompt_length} tokens and an answer of up to {max_new_tokens}"
    require_context(model, prompt_length + max_new_tokens, what, "model.generation.max_new_tokens or data.max_length")


def _decoding(settings: GenerationSettings, ends: list[int], pad: int | None) -> GenerationConfig:
    """Return settings for transformers, including those that it would otherwise take from the model's own files."""
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p} if settings.do_sample else {}
    return GenerationConfig(
        **{"temperature": 1.0, "top_p": 1.0, **sampling},
        do_sample=settings.do_sample,
        top_k=0 if settings.do_sample else 50,  # 50: transformers' default, about which greedy decoding does not warn
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=settings.max_new_tokens,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=ends[0] if pad is None else pad,
        stop_strings=list(settings.stop_strings) or None,
        return_dict_in_generate=False,
    )


def _end_ids(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> list[int]:
    """Return the tokens that end a text: the tokenizer's, those of the model (chat models have several), and the given."""
    own = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *stop_ids]
    ends = list(dict.fromkeys(int(token) for token in ids if token is not None))
    if not ends:
        raise InvalidValueError(
            "data.tokenizer: expected one with an eos_token, without which no answer would ever end, got "
            f"{tokenizer.name_or_path!r} without. Set its eos_token, or set data.tokenizer to one that has it."
        )
    return ends


def _answer(
    tokens: list[int], tokenizer: PreTrainedTokenizerBase, ends: list[int], stop_strings: tuple[str, ...]
) -> Answer:
    length = next((index + 1 for index, token in enumerate(tokens) if token in ends), None)
    text = str(tokenizer.decode(tokens[:length], skip_special_tokens=True))
    stops = [text.find(stop) for stop in stop_strings if stop in text]
    if stops:
        text = text[: min(stops)]
    return Answer(text.strip(), length is not None or bool(stops))


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Keep the model in evaluation mode: no dropout, and no gradient checkpointing, which would switch the cache off."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
