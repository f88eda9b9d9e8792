"""Chat templates in the syntax in which they are published, each with a tiny tokenizer and what a conversation teaches.

The templates stand beside this file in `chat_templates`. `CHAT_FAMILIES[name].marked` is the rendering of `CONVERSATION`,
written by hand, with ⟦ and ⟧ around what a model is to learn: every answer and the token that ends its turn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

Message = dict[str, str]

CONVERSATION: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 × 3?"},
    {"role": "assistant", "content": "9."},
]


@dataclass(frozen=True)
class ChatFamily:
    """What the tests know of one family's template and tokenizer."""

    tokens: tuple[str, ...]  # the special ones
    eos: str
    turn_end: str  # the last token of an answer
    marked: str  # the rendering of CONVERSATION (of `messages`), with what is learnt in ⟦ ⟧
    bos: str | None = None  # its tokenizer writes it before any text, the template writes it too
    plain_tokens: tuple[str, ...] = ()  # tokens of their own that are not special
    answer_start: str = ""  # what `add_generation_prompt` adds
    takes_system: bool = True
    alternates: bool = False  # refuses two turns of one role
    trims: bool = False  # takes the white space around an answer away
    growing: bool = True  # the rendering of the first turns begins the rendering of all
    marks_answers: bool = False  # the template has generation marks

    @property
    def messages(self) -> list[Message]:
        """The conversation, without its system message where the template refuses one."""
        return CONVERSATION if self.takes_system else CONVERSATION[1:]

    @property
    def rendering(self) -> str:
        """The whole text, without marks."""
        return re.sub("[⟦⟧]", "", self.marked)

    @property
    def learnt(self) -> list[str]:
        """The pieces of text that are learnt, in order."""
        return re.findall("⟦(.*?)⟧", self.marked, flags=re.DOTALL)

    @property
    def learnt_characters(self) -> list[tuple[int, int]]:
        """Where in `rendering` they start and end."""
        pieces = re.split("[⟦⟧]", self.marked)
        ends = [sum(map(len, pieces[: n + 1])) for n in range(len(pieces))]
        return list(zip(ends[0::2], ends[1::2], strict=False))


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHATML_START = "<|im_start|>assistant\n"
_CHATML_RENDERING = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n⟦4.<|im_end|>⟧\n"
    "<|im_start|>user\nAnd 3 × 3?<|im_end|>\n<|im_start|>assistant\n⟦9.<|im_end|>⟧\n"
)
_LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_PHI = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

CHAT_FAMILIES: dict[str, ChatFamily] = {
    "chatml": ChatFamily(
        tokens=_CHATML,
        eos="<|im_end|>",
        turn_end="<|im_end|>",
        answer_start=_CHATML_START,
        marked=_CHATML_RENDERING,
    ),
    "smollm2": ChatFamily(  # without a system message it writes its own
        tokens=_CHATML,
        eos="<|im_end|>",
        turn_end="<|im_end|>",
        answer_start=_CHATML_START,
        marked=_CHATML_RENDERING,
    ),
    "chatml_marked": ChatFamily(
        tokens=_CHATML,
        eos="<|im_end|>",
        turn_end="<|im_end|>",
        answer_start=_CHATML_START,
        marks_answers=True,
        marked=_CHATML_RENDERING,
    ),
    "chatml_marked_without_end": ChatFamily(  # its marks leave the turn end out, although it is to be learnt
        tokens=_CHATML,
        eos="<|im_end|>",
        turn_end="<|im_end|>",
        answer_start=_CHATML_START,
        marks_answers=True,
        marked=_CHATML_RENDERING,
    ),
    "llama3": ChatFamily(
        tokens=_LLAMA,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        turn_end="<|eot_id|>",
        answer_start="<|start_header_id|>assistant<|end_header_id|>\n\n",
        trims=True,
        marked=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦4.<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd 3 × 3?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦9.<|eot_id|>⟧"
        ),
    ),
    "gemma2": ChatFamily(
        tokens=_GEMMA,
        bos="<bos>",
        eos="<eos>",
        turn_end="<end_of_turn>",
        answer_start="<start_of_turn>model\n",
        takes_system=False,
        alternates=True,
        trims=True,
        marked=(
            "<bos><start_of_turn>user\n2 + 2?<end_of_turn>\n<start_of_turn>model\n⟦4.<end_of_turn>⟧\n"
            "<start_of_turn>user\nAnd 3 × 3?<end_of_turn>\n<start_of_turn>model\n⟦9.<end_of_turn>⟧\n"
        ),
    ),
    "gemma3": ChatFamily(
        tokens=_GEMMA,
        bos="<bos>",
        eos="<eos>",
        turn_end="<end_of_turn>",
        answer_start="<start_of_turn>model\n",
        alternates=True,
        trims=True,
        marked=(
            "<bos><start_of_turn>user\nBe brief.\n\n2 + 2?<end_of_turn>\n<start_of_turn>model\n⟦4.<end_of_turn>⟧\n"
            "<start_of_turn>user\nAnd 3 × 3?<end_of_turn>\n<start_of_turn>model\n⟦9.<end_of_turn>⟧\n"
        ),
    ),
    "mistral_v1": ChatFamily(  # of the two spaces around an answer's start, the second is the model's to write
        tokens=("<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        turn_end="</s>",
        takes_system=False,
        alternates=True,
        marked="<s>[INST] 2 + 2? [/INST]⟦ 4.</s>⟧[INST] And 3 × 3? [/INST]⟦ 9.</s>⟧",
    ),
    "mistral_v3": ChatFamily(  # the system text is lost where an answer ends the conversation
        tokens=("<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        turn_end="</s>",
        alternates=True,
        trims=True,
        growing=False,
        marked="<s>[INST] 2 + 2?[/INST]⟦ 4.</s>⟧[INST] And 3 × 3?[/INST]⟦ 9.</s>⟧",
    ),
    "mistral_last_user": ChatFamily(
        tokens=("<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        turn_end="</s>",
        alternates=True,
        trims=True,
        growing=False,
        marked="<s>[INST] 2 + 2?[/INST]⟦ 4.</s>⟧[INST] Be brief.\n\nAnd 3 × 3?[/INST]⟦ 9.</s>⟧",
    ),
    "phi3": ChatFamily(  # the rendering of some turns ends in a token that the rendering of more of them lacks there
        tokens=_PHI,
        eos="<|endoftext|>",
        turn_end="<|end|>",
        answer_start="<|assistant|>\n",
        growing=False,
        marked=(
            "<|system|>\nBe brief.<|end|>\n<|user|>\n2 + 2?<|end|>\n<|assistant|>\n⟦4.<|end|>⟧\n"
            "<|user|>\nAnd 3 × 3?<|end|>\n<|assistant|>\n⟦9.<|end|>⟧\n<|endoftext|>"
        ),
    ),
    "phi4_mini": ChatFamily(
        tokens=_PHI,
        eos="<|endoftext|>",
        turn_end="<|end|>",
        answer_start="<|assistant|>",
        growing=False,
        marked=(
            "<|system|>Be brief.<|end|><|user|>2 + 2?<|end|><|assistant|>⟦4.<|end|>⟧"
            "<|user|>And 3 × 3?<|end|><|assistant|>⟦9.<|end|>⟧<|endoftext|>"
        ),
    ),
    "qwen2_5": ChatFamily(  # without a system message it writes its own
        tokens=_CHATML,
        eos="<|im_end|>",
        turn_end="<|im_end|>",
        plain_tokens=("<tool_call>", "</tool_call>"),
        answer_start=_CHATML_START,
        marked=_CHATML_RENDERING,
    ),
    "qwen3": ChatFamily(  # an answer shows its (here empty) thought as long as no question follows
        tokens=_CHATML,
        eos="<|im_end|>",
        turn_end="<|im_end|>",
        plain_tokens=("<think>", "</think>"),
        answer_start=_CHATML_START,
        growing=False,
        marked=(
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n⟦4.<|im_end|>⟧\n"
            "<|im_start|>user\nAnd 3 × 3?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\n9.<|im_end|>⟧\n"
        ),
    ),
}


def chat_template(name: str) -> str:
    """The text of one of the files in `chat_templates`."""
    return (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@lru_cache
def chat_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token a byte, so that any text is encoded and decodes back, the family's special tokens, and its template."""
    known = CHAT_FAMILIES[family]
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in known.tokens])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in known.plain_tokens])
    if known.bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{known.bos} $A",
            pair=f"{known.bos} $A {known.bos} $B",
            special_tokens=[(known.bos, tokenizer.token_to_id(known.bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=known.bos,
        eos_token=known.eos,
        pad_token=known.tokens[0],
        extra_special_tokens=list(known.tokens),
        chat_template=chat_template(family),
        model_max_length=1024,
    )
