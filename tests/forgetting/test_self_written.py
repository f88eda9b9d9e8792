"""General text that the backbone writes by itself: always the same for a seed, without its adapter, and in both forms."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from grit_lightning.datamodules.pipeline.chat_template import ChatTemplate
from grit_lightning.datamodules.pipeline.text_tokens import TextTokens
from grit_lightning.errors import InvalidValueError
from grit_lightning.forgetting.self_written import _Chat, write_general

from ..datamodules.chat_families import CHAT_FAMILIES, chat_tokenizer

TURNS = (
    "{% for m in messages %}<s>{{ m['role'][0] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)


@pytest.fixture
def adapted(
    tiny_llama: LlamaForCausalLM,
    lora_config: Callable[..., LoraConfig],
    randomize: Callable[[torch.nn.Module], torch.nn.Module],
) -> PeftModel:
    model = get_peft_model(tiny_llama, lora_config())
    randomize(model)
    return model


@pytest.fixture
def chatty(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tiny_tokenizer.chat_template = TURNS
    return tiny_tokenizer


def test_a_seed_gives_the_same_rows_and_no_random_number_is_taken(
    adapted: PeftModel, chatty: PreTrainedTokenizerFast
) -> None:
    adapted.train()
    settings = adapted.get_base_model().generation_config
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)

    first = write_general(adapted, chatty, 5, block_size=24, batch_size=2, seed=1)

    assert torch.equal(torch.rand(1), expected)
    assert all(module.training for module in adapted.modules())
    assert adapted.get_base_model().generation_config is settings
    assert write_general(adapted, chatty, 5, block_size=24, batch_size=2, seed=1) == first
    assert write_general(adapted, chatty, 5, block_size=24, batch_size=2, seed=2) != first


def test_the_adapter_has_no_say(
    adapted: PeftModel, chatty: PreTrainedTokenizerFast, make_tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    alone = write_general(make_tiny_llama(), chatty, 4, block_size=24)
    assert write_general(adapted, chatty, 4, block_size=24) == alone
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter *= 100
    assert write_general(adapted, chatty, 4, block_size=24) == alone


class Always(torch.nn.Module):
    """A head that gives a token the same probability everywhere."""

    def __init__(self, probabilities: dict[int, float]) -> None:
        super().__init__()
        self.logits = torch.full((320,), -1e9)
        for token, probability in probabilities.items():
            self.logits[token] = math.log(probability)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*hidden.shape[:-1], -1)


def test_blocks_follow_the_model_s_own_distribution_and_go_on_behind_an_end(
    tiny_llama: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_llama.lm_head = Always({2: 0.5, 10: 0.375, 11: 0.125})  # 2 is the end of a text
    tiny_llama.generation_config.update(repetition_penalty=5.0, top_k=1, eos_token_id=2)

    rows = write_general(tiny_llama, tiny_tokenizer, 40, block_size=32, batch_size=40)

    assert all(row["input_ids"][0] == 1 and len(row["input_ids"]) == 32 and row["learnt"] == [1, 32] for row in rows)
    drawn = torch.tensor([token for row in rows for token in row["input_ids"][1:]])
    shares = torch.bincount(drawn, minlength=320) / len(drawn)
    torch.testing.assert_close(
        shares[[2, 10, 11]], torch.tensor([0.5, 0.375, 0.125]), atol=0.05, rtol=0
    )  # of 1,240 draws


def test_a_tokenizer_without_a_begin_of_sequence_begins_behind_an_end(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.bos_token = None
    assert write_general(tiny_llama, tiny_tokenizer, 1, block_size=8)[0]["input_ids"][0] == 2


def test_half_are_conversations_with_a_message_and_an_answer_that_counts(
    tiny_llama: Any, chatty: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():
        tiny_llama.lm_head.weight *= 0.01  # so that a turn ends at about one token in 320
        tiny_llama.lm_head.weight[2] = 0
    rows = write_general(tiny_llama, chatty, 9, block_size=40, batch_size=3)

    blocks, conversations = rows[:5], rows[5:]
    assert all(row["learnt"] == [1, 40] for row in blocks)
    for row in conversations:
        ids, (start, end) = row["input_ids"], row["learnt"]
        head, behind = chatty("<s>u:").input_ids, chatty("</s><s>a:").input_ids
        assert ids[: len(head)] == head
        assert ids[start - len(behind) : start] == behind
        assert len(head) < start < end == len(ids) <= 40
        assert 2 not in ids[start : end - 1]  # nothing behind the end of the answer
    assert len({tuple(row["input_ids"]) for row in conversations}) == 4


def test_turns_end_where_the_model_ends_them(tiny_llama: Any, chatty: PreTrainedTokenizerFast) -> None:
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()
        tiny_llama.model.norm.weight.fill_(1.0)
    calls = []
    generate = tiny_llama.generate

    def ending(*args: Any, **options: Any) -> Any:
        calls.append(options["attention_mask"])
        found = generate(*args, **options)
        new = options["input_ids"].shape[1]
        found[0, new + 2 :] = 2  # as transformers fills a row that has ended
        return found

    tiny_llama.generate = ending
    (block, row) = write_general(tiny_llama, chatty, 2, block_size=40)
    assert len(block["input_ids"]) == 40
    head, behind = chatty("<s>u:").input_ids, chatty("</s><s>a:").input_ids
    assert (
        len(row["input_ids"]) == len(head) + 2 + len(behind) + 2 + 1
    )  # the answer's end is learnt, the message's is there
    assert row["learnt"] == [len(head) + 2 + len(behind), len(row["input_ids"])]
    assert row["input_ids"][-1] == 2


def test_a_model_with_learned_positions_writes_within_its_context(
    chatty: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=40))
    generate = model.generate

    def uneven(*args: Any, **options: Any) -> Any:
        found, start = generate(*args, **options), options["input_ids"].shape[1]
        if found.shape[1] < 40:  # the messages, one of which ends at once and one of which fills its room
            found[0, start:], found[1, start:] = 2, 10
        return found

    monkeypatch.setattr(model, "generate", uneven)

    rows = write_general(model, chatty, 4, block_size=40)

    short, long = rows[2:]
    assert short["learnt"][0] + 5 < long["learnt"][0]
    assert all(row["learnt"][0] < len(row["input_ids"]) <= 40 for row in rows)


def test_held_out_text_is_written_again_where_it_is_calibration_text(
    tiny_llama: Any, chatty: PreTrainedTokenizerFast
) -> None:
    tiny_llama.lm_head = Always({2: 0.8, 10: 0.2})  # most messages and answers end at once
    first = write_general(tiny_llama, chatty, 24, block_size=32, batch_size=4)
    second = write_general(tiny_llama, chatty, 12, block_size=32, batch_size=4, seed=1)
    known = {tuple(row["input_ids"]) for row in first}
    assert any(tuple(row["input_ids"]) in known for row in second)
    told: list[tuple[Any, ...]] = []

    apart = write_general(
        tiny_llama,
        chatty,
        12,
        block_size=32,
        batch_size=4,
        seed=1,
        apart_from=first,
        progress=lambda *now: told.append(now),
    )

    assert not any(tuple(row["input_ids"]) in known for row in apart)
    assert 6 < len(apart) <= 12
    assert told[-1][1:] == (len(apart), len(apart))  # so that a bar comes to its end
    tiny_llama.lm_head = Always({2: 1.0})
    same = write_general(tiny_llama, chatty, 4, block_size=32)
    with pytest.raises(
        InvalidValueError, match=r"expected a model that writes more than the 2 rows .* nothing else in 8 rows"
    ):
        write_general(tiny_llama, chatty, 2, seed=1, block_size=32, apart_from=same)


@pytest.mark.parametrize("name", CHAT_FAMILIES)
def test_what_stands_around_a_message_is_what_the_chat_template_writes(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    messages = [{"role": "user", "content": "2+2?"}]
    written = ChatTemplate(TextTokens(tokenizer)).write(messages, answered=False)

    chat = _Chat.of(tokenizer)

    ends_turns_with_words = re.search(r"2\+2\?(.*)", written, flags=re.DOTALL)[1].startswith(" [/INST]")  # type: ignore[index]
    if ends_turns_with_words and "[/INST]" not in tokenizer.all_special_tokens:
        assert chat is None
    else:
        assert chat is not None
        assert tokenizer.decode(chat.before) + "2+2?" + tokenizer.decode(chat.behind) == written
        assert chat.behind[0] in chat.user_ends
        assert tokenizer.convert_tokens_to_ids(CHAT_FAMILIES[name].turn_end) in chat.answer_ends


def test_what_cannot_write_is_refused(tiny_llama: Any, chatty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidValueError, match="expected a block size with room for the chat template"):
        write_general(tiny_llama, chatty, 2, block_size=8)
    with pytest.raises(InvalidValueError, match=r"got 200 for self-written text. Lower the block size"):
        write_general(tiny_llama, chatty, 2, block_size=200)
    with pytest.raises(InvalidValueError, match="expected a model that generates, got LlamaModel"):
        write_general(tiny_llama.model, chatty, 2)
    chatty.chat_template = chatty.bos_token = chatty.eos_token = None
    with pytest.raises(InvalidValueError, match="expected a tokenizer with a bos_token or an eos_token"):
        write_general(tiny_llama, chatty, 2, block_size=10)
