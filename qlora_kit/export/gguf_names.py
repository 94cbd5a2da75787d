"""GGUF_ARCHITECTURES: how each decoder that this kit trains is written for llama.cpp.

Why: llama.cpp keeps the weights of a model in an order and under fields of its own; each row says what differs from
the Hugging Face folder, and what llama.cpp computes differently is refused here instead of written wrongly.
How: the key is transformers' `model_type`; a row is given transformers' config object, whose defaults are filled in.
Tensor names come from the `gguf` package's own map. Source of every rule: llama.cpp's convert_hf_to_gguf.py; the proof
is `python -m tools.prove_gguf`, which compares logits with llama.cpp itself.
Imported by: export.gguf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlora_kit.errors import ModelError

Fields = dict[str, Any]  # name without the architecture's prefix -> int, float, bool or str, as GGUF will hold it


@dataclass(frozen=True)
class GgufArchitecture:
    """One row.

    Attributes:
        name: llama.cpp's name of the architecture.
        activations: what it computes between the two halves of the MLP, in transformers' words.
        fields: config -> hyperparameters.
        row_order: (config, linear relative to its block) -> new order of the rows of weight and bias; None: as it is.
        norm_offset: what llama.cpp wants added to the weight of every norm.
        rope_tensors: config -> factors of the rotary frequencies, where scaling gives each its own.
        biases: linears may have biases.
        require: raises what llama.cpp would compute otherwise than the model was trained.
    """

    name: str
    activations: tuple[str, ...] = ("silu",)
    fields: Callable[[Any], Fields] = lambda config: _gated(config)
    row_order: Callable[[Any, str], Tensor | None] = lambda config, linear: None
    norm_offset: float = 0.0
    rope_tensors: Callable[[Any], dict[str, Tensor]] = lambda config: _rope_tensors(config)
    biases: bool = False
    require: Callable[[Any], None] = lambda config: _require_full_attention(config)


# ------------------------------------------------------------------------------------------------ fields


def _sizes(config: Any) -> Fields:
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _gated(config: Any) -> Fields:
    """Llama and its kin: RMS norms, gated MLP, rotary positions."""
    head_dim = _head_dim(config)
    return {
        **_sizes(config),
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **_rope_fields(config, _rope(config)),
    }


def _windowed(config: Any) -> Fields:
    """llama.cpp attends to everything; within the window that is the same, so the window is the context's length."""
    length = config.max_position_embeddings
    return {**_gated(config), "context_length": min(config.sliding_window or length, length)}


def _gemma2(config: Any) -> Fields:
    return {
        **_gated(config),
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _gemma3(config: Any) -> Fields:
    return {**_gated(config), "attention.sliding_window": config.sliding_window}


def _phi3(config: Any) -> Fields:
    """Beyond the original length llama.cpp takes the long rotary factors, as transformers does."""
    original = config.original_max_position_embeddings or config.max_position_embeddings
    return {**_windowed(config), "rope.scaling.original_context_length": original}


def _gpt2(config: Any) -> Fields:
    return {
        **_sizes(config),
        "feed_forward_length": config.n_inner or 4 * config.hidden_size,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def _gpt_neox(config: Any) -> Fields:
    return {
        **_sizes(config),
        "feed_forward_length": config.intermediate_size,
        "attention.layer_norm_epsilon": config.layer_norm_eps,
        "use_parallel_residual": config.use_parallel_residual,
        **_rope_fields(config, _rope(config)),
    }


# ------------------------------------------------------------------------------------------------ rotary positions


def _rope(config: Any) -> Mapping[str, Any]:
    """The parameters of the blocks that see everything; Gemma 3 has others for its sliding ones."""
    found: Mapping[str, Any] = config.rope_parameters
    return found.get("full_attention", found)


def _rope_fields(config: Any, rope: Mapping[str, Any]) -> Fields:
    """Raises: ModelError: llama.cpp has no such scaling of the rotary frequencies."""
    kind = rope.get("rope_type", "default")
    fields: Fields = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0)),
    }
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        _require_only(rope, "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for name in {"beta_fast", "beta_slow"} & set(rope):
            fields[f"rope.scaling.yarn_{name}"] = float(rope[name])
    if kind == "longrope":
        fields |= {"rope.scaling.type": kind, "rope.scaling.attn_factor": _longrope_attention(config, rope)}
    if kind not in ("default", "linear", "yarn", "llama3", "longrope"):
        raise ModelError(f"config field 'rope_parameters': GGUF has no rotary scaling of type {kind!r:.80}")
    return fields


def _require_only(rope: Mapping[str, Any], *known: str) -> None:
    """Raises: ModelError: a parameter of the scaling that GGUF does not hold."""
    shared = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for name in rope.keys() - shared - set(known):
        raise ModelError(f"config field 'rope_parameters': GGUF has no place for {name!r} = {rope[name]!r:.80}")


def _longrope_attention(config: Any, rope: Mapping[str, Any]) -> float:
    """What the scores are multiplied by; Phi-3's paper (arXiv:2404.14219), as transformers computes it."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _rope_tensors(config: Any) -> dict[str, Tensor]:
    """What each frequency is divided by: Llama 3's rule, or the two lists of longrope."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        lengths = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
        return {name: torch.tensor(rope[key], dtype=torch.float32) for name, key in lengths.items()}
    if kind != "llama3":
        return {}
    original, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    head_dim = _head_dim(config)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    factors = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return {"rope_freqs.weight": factors.float()}


# ------------------------------------------------------------------------------------------------ order of rows


def _paired_rows(config: Any, linear: str) -> Tensor | None:
    """The two rows of q and k that are rotated together stand side by side; transformers has them half a head apart."""
    heads = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads,
    }.get(linear)
    if heads is None:
        return None
    head_dim = _head_dim(config)
    return torch.arange(heads * head_dim).view(heads, 2, head_dim // 2).transpose(1, 2).reshape(-1)


def _queries_first(config: Any, linear: str) -> Tensor | None:
    """All queries, then all keys, then all values; GPT-NeoX has the three of a head together."""
    if linear != "attention.query_key_value":
        return None
    heads, width = config.num_attention_heads, config.hidden_size
    return torch.arange(3 * width).view(heads, 3, width // heads).transpose(0, 1).reshape(-1)


# ------------------------------------------------------------------------------------------------ what cannot be said


def _require_full_attention(config: Any) -> None:
    """Raises: ModelError: some blocks look back a window only, and llama.cpp would let them see everything."""
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ModelError("config field 'layer_types': GGUF has no sliding window for this architecture")


def _require_gemma(period: int, wide_layers: int) -> Callable[[Any], None]:
    """Every `period`-th block is full; scores are scaled by the head, in the largest model by the residual's share."""

    def require(config: Any) -> None:
        layers, head_dim = config.num_hidden_layers, _head_dim(config)
        shared = config.hidden_size // config.num_attention_heads
        expected = shared if layers == wide_layers else head_dim
        if config.query_pre_attn_scalar != expected:
            found = config.query_pre_attn_scalar
            raise ModelError(f"config field 'query_pre_attn_scalar': llama.cpp computes with {expected}, found {found}")
        kinds = ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)]
        if list(config.layer_types) != kinds:
            raise ModelError(f"config field 'layer_types': llama.cpp has every {period}th block full, no other pattern")
        local = config.rope_parameters.get("sliding_attention")
        if local is not None and (local["rope_theta"], local.get("rope_type", "default")) != (10_000.0, "default"):
            raise ModelError("config field 'rope_parameters': llama.cpp has base 10000, unscaled, in sliding blocks")

    return require


def _anything(config: Any) -> None:
    """No check."""


_LLAMA = GgufArchitecture("llama", row_order=_paired_rows, biases=True)
_GEMMA2 = GgufArchitecture(
    "gemma2", ("gelu_pytorch_tanh",), _gemma2, norm_offset=1.0, require=_require_gemma(period=2, wide_layers=46)
)
GGUF_ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, fields=_windowed, require=_anything),
    "qwen2": GgufArchitecture("qwen2", biases=True),
    "qwen3": GgufArchitecture("qwen3"),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, name="gemma3", fields=_gemma3, require=_require_gemma(period=6, wide_layers=62)),
    "phi3": GgufArchitecture("phi3", fields=_phi3, require=_anything),
    "olmo2": GgufArchitecture("olmo2"),
    "gpt2": GgufArchitecture(
        "gpt2", ("gelu_new",), _gpt2, rope_tensors=lambda config: {}, biases=True, require=_anything
    ),
    "gpt_neox": GgufArchitecture(
        "gptneox", ("gelu", "gelu_new"), _gpt_neox, _queries_first, biases=True, require=_anything
    ),
}
