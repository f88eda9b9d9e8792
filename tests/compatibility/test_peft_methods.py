"""Every method of PEFT that can be configured without data, and the variants of LoRA."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import peft
import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from . import page
from .cases import MARKED, Case, lora
from .conftest import Compare
from .tiny_models import HIDDEN, TWO_LAYERS
from .watching import Run, require

LAYERS = {"target_modules": ["q_proj", "v_proj"]}
RANK = LAYERS | {"r": 4}
VIRTUAL = {"num_virtual_tokens": 4}

# Configuration class → settings, where its defaults are too large for a tiny model or say nothing.
METHODS: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": LAYERS | {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 4},
    "AdamssConfig": RANK | {"num_subspaces": 2, "subspace_rank": 1},
    "AdaptionPromptConfig": {"adapter_len": 4, "adapter_layers": 1},
    "BOFTConfig": LAYERS | {"boft_block_size": 4},
    "BeftConfig": {"target_modules": ["v_proj"]},
    "C3AConfig": LAYERS | {"block_size": 8},
    "CPTConfig": VIRTUAL | {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "CartridgeConfig": VIRTUAL,
    "DeftConfig": RANK,
    "DeloraConfig": RANK,
    "FourierFTConfig": LAYERS | {"n_frequency": 16},
    "FrodConfig": LAYERS,
    "GloraConfig": RANK,
    "GraloraConfig": RANK | {"gralora_k": 2},
    "HRAConfig": RANK,
    "HiraConfig": RANK,
    "IA3Config": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LNTuningConfig": {},
    "LilyConfig": RANK | {"stride_A": 1, "num_B": 2},
    "LoHaConfig": RANK | {"alpha": 4},
    "LoKrConfig": RANK | {"alpha": 4},
    "LoraConfig": RANK,
    "MissConfig": RANK,
    "MultitaskPromptTuningConfig": VIRTUAL | {"num_tasks": 2},
    "OFTConfig": LAYERS | {"oft_block_size": 8, "use_cayley_neumann": False},
    "OSFConfig": LAYERS | {"effective_rank": 4},
    "PeanutConfig": RANK,
    "PolyConfig": RANK | {"n_tasks": 1, "n_skills": 2},
    "PrefixTuningConfig": VIRTUAL,
    "PromptEncoderConfig": VIRTUAL | {"encoder_hidden_size": 16},
    "PromptTuningConfig": VIRTUAL,
    "PsoftConfig": RANK,
    "PveraConfig": RANK,
    "RandLoraConfig": RANK,
    "RoadConfig": LAYERS | {"group_size": 8},
    "ShadowConfig": {"r": 4},
    "ShiraConfig": RANK,
    "SupertuningConfig": LAYERS | {"sparsity": 0.9},
    "TinyLoraConfig": {"target_modules": ["q_proj", "o_proj"], "r": 2},
    "TrainableTokensConfig": {"token_indices": [*MARKED], "target_modules": ["embed_tokens"]},
    "UniLoraConfig": RANK | {"theta_d_length": 64},
    "VBLoRAConfig": RANK | {"num_vectors": 8, "vector_length": 8},
    "VeraConfig": {"target_modules": ["q_proj", "o_proj"], "r": 4},
    "WaveFTConfig": LAYERS | {"n_frequency": 16},
}
NOT_WITHOUT_MORE = {"XLoraConfig": "mixes LoRA adapters that are already trained"}

VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "`use_rslora`": lambda: {"use_rslora": True},
    "`use_dora`": lambda: {"use_dora": True},
    "`lora_dropout`": lambda: {"lora_dropout": 0.1},
    "`bias: all`": lambda: {"bias": "all"},
    "`bias: lora_only`": lambda: {"bias": "lora_only"},
    "`lora_bias`": lambda: {"lora_bias": True},
    "`rank_pattern`": lambda: {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
    "`layers_to_transform`": lambda: {"layers_to_transform": [1]},
    "`layer_replication`": lambda: {"layer_replication": [[0, 2], [1, 2]]},
    "`exclude_modules`": lambda: {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "`modules_to_save: [lm_head]`": lambda: {"modules_to_save": ["lm_head"]},
    "`modules_to_save: [embed_tokens, lm_head]`": lambda: {"modules_to_save": ["embed_tokens", "lm_head"]},
    "on `embed_tokens`": lambda: {"target_modules": ["q_proj", "embed_tokens"]},
    "on `lm_head`": lambda: {"target_modules": ["q_proj", "lm_head"]},
    "`trainable_token_indices`": lambda: {"trainable_token_indices": [*MARKED]},
    "`alora_invocation_tokens`": lambda: {"alora_invocation_tokens": [MARKED[0]]},
    "`use_qalora`": lambda: {"use_qalora": True, "qalora_group_size": 8},
    "`use_bdlora`": lambda: {"use_bdlora": peft.tuners.lora.BdLoraConfig(["q_proj"], ["v_proj"], nblocks=2)},
    "`kasa_config`": lambda: {"kasa_config": peft.tuners.lora.KasaConfig()},
    "`velora_config`": lambda: {"velora_config": peft.tuners.lora.VeloraConfig(num_groups=4)},
    "`monteclora_config`": lambda: {"monteclora_config": peft.tuners.lora.MontecloraConfig()},
}
TIED: dict[str, dict[str, Any]] = {
    "on `lm_head`": {"target_modules": ["q_proj", "lm_head"]},
    "on `embed_tokens`, `ensure_weight_tying`": {
        "target_modules": ["q_proj", "embed_tokens"],
        "ensure_weight_tying": True,
    },
    "`modules_to_save: [embed_tokens]`, `ensure_weight_tying`": {
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "`trainable_token_indices`": {"trainable_token_indices": [*MARKED]},
}


def _ranks_moved(run: Run) -> None:
    require(bool(run.module.peft_model.peft_config["default"].rank_pattern), "AdaLoRA has allocated no ranks")


def _pools_inputs(run: Run) -> None:
    layer = run.module.peft_model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default")
    require(
        layer.in_features == HIDDEN // 8, "the inputs are not pooled in groups: PEFT does so in quantised layers only"
    )


CHECKS = {"AdaLoraConfig": _ranks_moved, "`use_qalora`": _pools_inputs}


def _method(name: str) -> Callable[[], PeftConfig]:
    return lambda: getattr(peft, name)(task_type="CAUSAL_LM", **METHODS[name])


def _variant(settings: Callable[[], dict[str, Any]]) -> Callable[[], PeftConfig]:
    return lambda: lora(**({"target_modules": ["q_proj", "v_proj"]} | settings()))


def _anything(run: Run) -> None:
    pass


CASES = [
    Case(
        name.removesuffix("Config"),
        adapter=_method(name),
        exports=True,
        check=CHECKS.get(name, _anything),
        needs=f"peft:{name}",
    )
    for name in METHODS
]
VARIANT_CASES = [
    *(
        Case(name, TWO_LAYERS, adapter=_variant(settings), exports=True, check=CHECKS.get(name, _anything))
        for name, settings in VARIANTS.items()
    ),
    *(
        Case(
            f"{name}, tied embeddings",
            "Llama with tied embeddings",
            adapter=_variant(lambda s=settings: s),
            exports=True,
        )
        for name, settings in TIED.items()
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_method_trains_as_the_page_says(case: Case, compare: Compare) -> None:
    compare("PEFT methods", CASES, case)


@pytest.mark.parametrize("case", VARIANT_CASES, ids=lambda case: case.name)
def test_a_variant_of_lora_trains_as_the_page_says(case: Case, compare: Compare) -> None:
    compare("Variants of LoRA", VARIANT_CASES, case)


@pytest.mark.skipif(f"peft {version('peft')}," not in page.PAGE.read_text(), reason="the page is of another PEFT")
def test_every_method_of_peft_has_a_row() -> None:
    known = {config.__name__ for config in PEFT_TYPE_TO_CONFIG_MAPPING.values()}
    assert known == {*METHODS, *NOT_WITHOUT_MORE}
