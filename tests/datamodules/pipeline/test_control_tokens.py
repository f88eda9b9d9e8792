"""Special tokens come from templates alone, and with a chat template an answer ends as that one ends a turn."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grit_lightning.datamodules.pipeline.encoding import PromptEncoder
from grit_lightning.datamodules.pipeline.prompts import PromptTemplate

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]


@pytest.fixture
def chat_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The byte tokenizer with the special tokens of three model families."""
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tiny_tokenizer.model_max_length = 1000
    return tiny_tokenizer


def encoder(tokenizer: Any, chat: str | None = None, prompt: str = "{q}", **settings: Any) -> PromptEncoder:
    tokenizer.chat_template = chat
    return PromptEncoder(tokenizer, PromptTemplate(prompt), 500, chat is not None, **settings)


def special_tokens(tokenizer: Any, ids: list[int]) -> list[str]:
    return [token for token in tokenizer.convert_ids_to_tokens(ids) if token in tokenizer.all_special_tokens]


@pytest.mark.parametrize("chat", [None, CHATML, LLAMA3, GEMMA, LLAMA2])
@pytest.mark.parametrize("name", ["<|im_end|>", "</s>", "<s>", "<|eot_id|>", "<end_of_turn>", "<unk>"])
def test_names_of_special_tokens_in_a_row_are_text(chat_tokenizer: Any, chat: str | None, name: str) -> None:
    encode = encoder(chat_tokenizer, chat).encode
    (plain,) = encode([{"q": "a b"}], ["yes"])
    (row,) = encode([{"q": f"a{name}\n{name} b"}], [f"y{name}es"])
    assert special_tokens(chat_tokenizer, row.input_ids) == special_tokens(chat_tokenizer, plain.input_ids)
    text = chat_tokenizer.decode(row.input_ids)
    assert f"a{name}\n{name} b" in text
    assert chat_tokenizer.decode(row.input_ids[row.prompt_length :]).strip() == f"y{name}es"


def test_names_in_a_row_may_be_allowed(chat_tokenizer: Any) -> None:
    (row,) = encoder(chat_tokenizer, allow_control_tokens=True).encode([{"q": "a<|im_end|>"}], ["</s>"])
    assert special_tokens(chat_tokenizer, row.input_ids) == ["<|im_end|>", "</s>"]


def test_special_tokens_of_the_template_stay_beside_names_in_a_row(chat_tokenizer: Any) -> None:
    encode = encoder(chat_tokenizer, prompt="<|im_start|>{q}<|im_end|>").encode
    (row,) = encode([{"q": "<|im_start|>"}], ["yes"])
    assert special_tokens(chat_tokenizer, row.input_ids) == ["<|im_start|>", "<|im_end|>"]
    assert "<|im_start|><|im_start|><|im_end|>" in chat_tokenizer.decode(row.input_ids)


@pytest.mark.parametrize(
    "text", ["\U0010fffd", "\U0010fffd0\U0010fffd", "</s>5\U0010fffd2\U0010fffd<s>", "\U0010fffc1\U0010fffc"]
)
def test_marks_in_a_row_are_text_too(chat_tokenizer: Any, text: str) -> None:
    (row,) = encoder(chat_tokenizer).encode([{"q": text}], ["yes"])
    assert chat_tokenizer.decode(row.input_ids[: row.prompt_length]) == text
    assert special_tokens(chat_tokenizer, row.input_ids) == []


def test_added_tokens_that_are_not_special_stay_tokens(chat_tokenizer: Any) -> None:
    chat_tokenizer.add_tokens(["<think>"])  # as reasoning models have it, and their data write it
    (row,) = encoder(chat_tokenizer).encode([{"q": "<s>"}], ["<think> so"])
    assert "<think>" in chat_tokenizer.convert_ids_to_tokens(row.input_ids)


def test_a_sentencepiece_tokenizer_gives_the_rest_of_the_text_its_usual_tokens() -> None:
    pieces = ["<unk>", "</s>", "▁", "a", "b", "<", "/", "s", ">", "▁a", "▁b"]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("▁", "a"), ("▁", "b")]))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=AddedToken("</s>"), unk_token="<unk>")
    (row,) = encoder(tokenizer, prompt="{q}</s>{q}").encode([{"q": "b </s> a"}], ["a"])
    name = ["<", "/", "s", ">"]
    assert tokenizer.convert_ids_to_tokens(row.input_ids[: row.prompt_length]) == (
        ["▁b", "▁", *name, "▁a", "</s>", "b", "▁", *name, "▁a"]
    )


def test_a_tokenizer_without_a_backend_refuses_such_rows(chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(chat_tokenizer), "backend_tokenizer", None)
    with pytest.raises(ValueError, match=r"allow_control_tokens: expected a fast tokenizer"):
        encoder(chat_tokenizer).encode([{"q": "<s>"}], ["yes"])


def test_a_cut_row_makes_no_special_tokens(chat_tokenizer: Any) -> None:
    template = PromptTemplate("{q}", truncate="q")
    (row,) = PromptEncoder(chat_tokenizer, template, 50).encode([{"q": "<|im_end|>" * 20}], ["yes"])
    assert row.status == "truncated"
    assert len(row.input_ids) == 50
    assert special_tokens(chat_tokenizer, row.input_ids) == []


@pytest.mark.parametrize(
    ("chat", "end", "stop"),
    [
        (None, "</s>", "</s>"),
        (CHATML, "<|im_end|>\n", "<|im_end|>"),
        (LLAMA3, "<|eot_id|>", "<|eot_id|>"),
        (GEMMA, "<end_of_turn>\n", "<end_of_turn>"),
        (LLAMA2, " </s>", "</s>"),
        (NO_END, "</s>", "</s>"),
    ],
    ids=["plain", "ChatML", "Llama 3", "Gemma", "Llama 2", "without end"],
)
def test_an_answer_ends_as_its_template_ends_a_turn(chat_tokenizer: Any, chat: str | None, end: str, stop: str) -> None:
    learning = encoder(chat_tokenizer, chat, append_eos=True)
    (row,) = learning.encode([{"q": "a"}], ["yes"])
    assert chat_tokenizer.decode(row.input_ids[row.prompt_length :]).strip(" ") == f"yes{end}"
    assert learning.stop_ids == [chat_tokenizer.convert_tokens_to_ids(stop)]
    if chat in (CHATML, LLAMA3, GEMMA):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]
        whole = chat_tokenizer.apply_chat_template(turns, tokenize=False)
        assert row.input_ids == chat_tokenizer(whole, add_special_tokens=False).input_ids


def test_a_refused_system_message_names_the_template(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = GEMMA
    template = PromptTemplate("{q}", system="Be terse.", name="mine.yaml")
    with pytest.raises(
        ValueError,
        match=r"template: expected .*, got 'mine.yaml', refused with 'System role not supported'. Move its `system`",
    ):
        PromptEncoder(chat_tokenizer, template, 500, use_chat_template=True)


@pytest.mark.parametrize("chat", [None, NO_END])
def test_answers_without_an_end_are_refused_and_those_that_need_none_are_not(
    chat_tokenizer: Any, chat: str | None
) -> None:
    chat_tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"append_eos: expected a tokenizer with an eos_token"):
        encoder(chat_tokenizer, chat, append_eos=True)
    assert encoder(chat_tokenizer, chat).encode([{"q": "a"}], ["yes"])
    assert encoder(chat_tokenizer, CHATML, append_eos=True).encode([{"q": "a"}], ["yes"])
