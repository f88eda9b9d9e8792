"""General text where there is none at hand: what the backbone writes by itself stands for what it knows.

Half of it, or all where the tokenizer has no chat template, is text from the begin-of-sequence token on. The other half are
conversations as the chat template writes them: the model writes the user's message behind the user's header, and then its own
answer (Magpie, arXiv 2406.08464). Everything is sampled at temperature 1, as then it follows the model's own distribution.

Shapes: B rows, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from grit_lightning.backbones.inputs import context_length, require_context
from grit_lightning.datamodules.pipeline.chat_template import ChatTemplate
from grit_lightning.datamodules.pipeline.collate import pad
from grit_lightning.datamodules.pipeline.text_tokens import TextTokens
from grit_lightning.errors import InvalidValueError
from grit_lightning.forgetting.general_text import BLOCK_SIZE, Row

Progress = Callable[[str, int, int], None]
NAME = "text of the model's own"
_DRAWS = 4  # times as many rows as are wanted, at most: then the model writes nothing new
_USER = "\U0010fffb"  # no template has it


@torch.no_grad()
def write_general(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    *,
    block_size: int = BLOCK_SIZE,
    batch_size: int = 8,
    seed: int = 0,
    apart_from: Iterable[Row] = (),
    progress: Progress | None = None,
) -> list[Row]:
    """Have a backbone write general text, without its adapter.

    The model's own generation settings do not apply. Text goes on behind an end-of-sequence token, as documents follow each
    other in pretraining, so that all blocks are full. Random numbers, modes and settings are as before afterwards.

    Args:
        model: A causal language model; an adapter on it is switched off.
        tokenizer: Its tokenizer.
        rows: How many blocks and conversations to write.
        block_size: Tokens of a block, and the most of a conversation.
        batch_size: Rows that are written together; other sizes draw other rows.
        seed: Determines what is drawn.
        apart_from: Rows not to return again, such as those that statistics are taken from where these are to measure on.
        progress: Is told what is written, how many rows of it are there, and how many there will be.

    Returns:
        Rows, blocks before conversations; fewer where the model goes on writing those of `apart_from`. In a block every token
        but the first counts, in a conversation the answer.

    Raises:
        ValueError: The model cannot generate, has too small a context, or writes nothing but `apart_from`, or the tokenizer has
            no token to begin with.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    can_generate = getattr(base, "can_generate", None)
    if can_generate is None or not can_generate():
        raise InvalidValueError(
            f"Self-written text: expected a model that generates, got {type(base).__name__}, which does not. Give text instead."
        )
    require_context(base, block_size, "self-written text", "the block size")
    chat = _Chat.of(tokenizer)
    talks = 0 if chat is None else rows // 2
    kinds = [(partial(_blocks, base, _first(tokenizer), block_size), rows - talks)]
    if chat is not None:
        kinds.append((partial(_conversations, base, chat, block_size), talks))
    known = {tuple(row["input_ids"]) for row in apart_from}
    written: list[Row] = []
    off = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    with isolate_rng(), off, _sampling(base):
        torch.manual_seed(seed)
        for write, count in kinds:
            for new in _new_rows(write, count, batch_size, known):
                written += new
                if progress is not None:
                    progress(NAME, len(written), rows)
    if rows and not written:
        raise InvalidValueError(
            f"Self-written text: expected a model that writes more than the {len(known)} rows that statistics are taken from, "
            f"got one that has written nothing else in {_DRAWS * rows} rows. Give text instead."
        )
    if progress is not None and len(written) < rows:
        progress(NAME, len(written), len(written))
    return written


def _new_rows(
    write: Callable[[int], list[Row]], count: int, batch_size: int, known: Collection[tuple[int, ...]]
) -> Iterator[list[Row]]:
    """Yield rows until there are `count` that are not known, or too many have been drawn."""
    found = drawn = 0
    while found < count and drawn < _DRAWS * count:
        size = min(batch_size, count - found)
        new = [row for row in write(size) if tuple(row["input_ids"]) not in known]
        found, drawn = found + len(new), drawn + size
        yield new


@dataclass(frozen=True)
class _Chat:
    """What a chat template writes around a user's message.

    Attributes:
        before: Tokens before the message.
        behind: Tokens behind it, up to where the answer begins.
        user_ends: Tokens that end the user's message.
        answer_ends: Tokens that end the answer.
    """

    before: list[int]
    behind: list[int]
    user_ends: frozenset[int]
    answer_ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _Chat | None:
        """Return the tokenizer's; None without one, or if it ends turns with words, at which sampling could not stop."""
        if not tokenizer.chat_template:
            return None
        tokens = TextTokens(tokenizer)
        template = ChatTemplate(tokens)
        before, found, behind = template.write([{"role": "user", "content": _USER}], answered=False).partition(_USER)
        special = set(tokens.controls.ids.values())
        ids = [tokens.ids([before])[0], tokens.ids_behind([behind], "\n")[0]]
        user_ends = [token for token in ids[1] if token in special][:1]
        if not found or not before or not user_ends or not template.stop_ids:
            return None
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return cls(ids[0], ids[1], frozenset([*user_ends, *eos]), frozenset([*template.stop_ids, *eos]))


def _blocks(base: PreTrainedModel, first: int, block_size: int, count: int) -> list[Row]:
    written = _continue(base, [[first]] * count, block_size)
    return [{"input_ids": ids, "learnt": [1, len(ids)]} for ids in written]


def _conversations(base: PreTrainedModel, chat: _Chat, block_size: int, count: int) -> list[Row]:
    """Have messages written, and then their answers; a message may take half of the room."""
    around = len(chat.before) + len(chat.behind)
    longest = (block_size - around) // 2
    if longest < 1:
        raise InvalidValueError(
            f"Self-written text: expected a block size with room for the chat template, {around} tokens, and a message and its "
            f"answer, got {block_size}. Raise it."
        )
    start = len(chat.before)
    messages = _continue(base, [chat.before] * count, start + longest, chat.user_ends)
    prompts = [_up_to(ids, start, chat.user_ends) + chat.behind for ids in messages]
    rows: list[Row] = []
    for prompt, ids in zip(prompts, _continue(base, prompts, block_size, chat.answer_ends), strict=True):
        whole = ids[: len(_up_to(ids, len(prompt), chat.answer_ends)) + 1]  # with its end, if it came to one
        rows.append({"input_ids": whole, "learnt": [len(prompt), len(whole)]})
    return rows


def _continue(
    base: PreTrainedModel, prompts: Sequence[list[int]], length: int, ends: frozenset[int] = frozenset()
) -> list[list[int]]:
    """Continue prompts up to `length` tokens, prompt included, or until all have come to an end.

    A short prompt stands behind padding and so needs more columns; where the context has no more, it is continued by less.
    """
    device = base.get_input_embeddings().weight.device
    sequences = [torch.tensor(ids) for ids in prompts]
    inputs = pad(sequences, 0, "left").to(device)
    mask = pad([torch.ones_like(ids) for ids in sequences], 0, "left").to(device)
    tokens, context = length - min(map(len, prompts)), context_length(base)
    if context is not None:
        tokens = min(tokens, context - inputs.shape[1])
    new = _generate(base, inputs, mask, tokens, ends)
    return [(ids + more)[:length] for ids, more in zip(prompts, new.tolist(), strict=True)]


def _generate(base: PreTrainedModel, inputs: Tensor, mask: Tensor, tokens: int, ends: frozenset[int]) -> Tensor:
    """Sample `[B, ≤ tokens]` behind left-padded prompts `[B, T]`."""
    stops: dict[str, Any] = {"eos_token_id": sorted(ends), "pad_token_id": min(ends)} if ends else {}
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, use_cache=True, **stops
    )
    sequences: Any = base.generate(input_ids=inputs, attention_mask=mask, generation_config=config)
    new: Tensor = sequences[:, inputs.shape[1] :]
    return new


@contextmanager
def _sampling(base: PreTrainedModel) -> Iterator[None]:
    """Keep a model in evaluation mode, and without the generation settings of its own that fill gaps in ours."""
    training = [module for module in base.modules() if module.training]
    own, base.generation_config = base.generation_config, GenerationConfig()
    base.eval()
    try:
        yield
    finally:
        base.generation_config = own
        for module in training:
            module.training = True


def _first(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that a text begins with: begin-of-sequence, or else what ends the text before it."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InvalidValueError(
        "Self-written text: expected a tokenizer with a bos_token or an eos_token to begin with, got one with neither. Set one "
        "of them."
    )


def _up_to(ids: list[int], start: int, ends: frozenset[int]) -> list[int]:
    """Return the tokens before the first of `ends` at or behind `start`."""
    stop = next((index for index in range(start, len(ids)) if ids[index] in ends), len(ids))
    return ids[:stop]
