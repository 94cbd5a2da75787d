"""What rows of ARCHITECTURES are made of: fields of a config.json, read with care, and a decoder's linears and norms.

Why: a row says which parts a decoder has; what a part is, by a config, stands here once and is shared.
How: every function takes a config and gives shapes; a field that is absent has the default of transformers' config
class, one that is absurd is refused by name. Imports no torch. Imported by architectures, planning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_kit.errors import ModelError

Config = Mapping[str, Any]
TensorShape = tuple[str, tuple[int, ...]]
DIMENSION_LIMIT = 1 << 24  # far above any vocabulary or width; catches damaged and hostile configs
LAYERS_LIMIT = 1024


@dataclass(frozen=True)
class LinearShape:
    """One linear of a block: y[out] = W[out, in] x[in] (+ bias[out]); `name` is relative to the block."""

    name: str
    out_features: int
    in_features: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Number of weights, the bias not counted."""
        return self.out_features * self.in_features


# ------------------------------------------------------------------------------------------ reading a config


def dimension(config: Config, *keys: str, default: int | None = None, limit: int = DIMENSION_LIMIT) -> int:
    """The first of `keys` that the config sets (null counts as absent), else `default`.

    Raises: ModelError: absent without a default, not an integer, or outside 1..limit; names the field.
    """
    key = next((key for key in keys if config.get(key) is not None), None)
    if key is None and default is not None:
        return default
    if key is None:
        raise ModelError(f"config has no {' or '.join(map(repr, keys))}; is this a complete config.json?")
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise ModelError(f"config field {key!r}: expected an integer from 1 to {limit}, found {value!r:.80}")
    return value


def flag(config: Config, key: str, default: bool) -> bool:
    """A boolean field; null counts as absent.

    Raises: ModelError: not a boolean; names the field.
    """
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelError(f"config field {key!r}: expected true or false, found {value!r:.80}")
    return value


def hidden_size(config: Config) -> int:
    """Width of the residual stream."""
    return dimension(config, "hidden_size", "n_embd")


def layer_count(config: Config) -> int:
    """Number of decoder blocks."""
    return dimension(config, "num_hidden_layers", "n_layer", limit=LAYERS_LIMIT)


def head_count(config: Config) -> int:
    """Number of query heads."""
    return dimension(config, "num_attention_heads", "n_head")


def vocabulary_size(config: Config) -> int:
    """Rows of the embedding and of the head."""
    return dimension(config, "vocab_size")


# ------------------------------------------------------------------------------------------ linears and norms


@dataclass(frozen=True)
class Heads:
    """Query width, key (= value) width and head width of an attention layer; defaults as transformers' class has them.

    `kv_default`: what an absent num_key_value_heads means (None, or the field being null: as many as query heads).
    """

    kv_default: int | None = None
    head_dim_default: int | None = None

    def widths(self, config: Config) -> tuple[int, int, int]:
        heads = head_count(config)
        head_dim = dimension(config, "head_dim", default=self.head_dim_default or hidden_size(config) // heads)
        kv_default = heads if "num_key_value_heads" in config or self.kv_default is None else self.kv_default
        return (
            heads * head_dim,
            dimension(config, "num_key_value_heads", default=kv_default) * head_dim,
            head_dim,
        )


def _is_on(config: Config, bias: str | bool) -> bool:
    """A bias that is always there, never there, or switched on by a config field."""
    return bias if isinstance(bias, bool) else flag(config, bias, False)


def separate_linears(
    heads: Heads, qkv_bias: str | bool = False, output_bias: str | bool = False, mlp_bias: str | bool = False
) -> Callable[[Config], list[LinearShape]]:
    """q, k, v, o, gate, up, down as seven linears (Llama and its kin)."""

    def linears(config: Config) -> list[LinearShape]:
        hidden, inner = hidden_size(config), dimension(config, "intermediate_size")
        query, key, _ = heads.widths(config)
        in_bias, out_bias, wide_bias = (_is_on(config, bias) for bias in (qkv_bias, output_bias, mlp_bias))
        return [
            LinearShape("self_attn.q_proj", query, hidden, in_bias),
            LinearShape("self_attn.k_proj", key, hidden, in_bias),
            LinearShape("self_attn.v_proj", key, hidden, in_bias),
            LinearShape("self_attn.o_proj", hidden, query, out_bias),
            LinearShape("mlp.gate_proj", inner, hidden, wide_bias),
            LinearShape("mlp.up_proj", inner, hidden, wide_bias),
            LinearShape("mlp.down_proj", hidden, inner, wide_bias),
        ]

    return linears


def phi3_linears(config: Config) -> list[LinearShape]:
    hidden, inner = hidden_size(config), dimension(config, "intermediate_size")
    query, key, _ = Heads().widths(config)
    return [
        LinearShape("self_attn.qkv_proj", query + 2 * key, hidden),
        LinearShape("self_attn.o_proj", hidden, query),
        LinearShape("mlp.gate_up_proj", 2 * inner, hidden),
        LinearShape("mlp.down_proj", hidden, inner),
    ]


def gpt2_linears(config: Config) -> list[LinearShape]:
    if flag(config, "add_cross_attention", False):
        raise ModelError("config field 'add_cross_attention': a decoder with cross attention is not supported")
    hidden = hidden_size(config)
    inner = dimension(config, "n_inner", default=4 * hidden)
    return [
        LinearShape("attn.c_attn", 3 * hidden, hidden, bias=True),
        LinearShape("attn.c_proj", hidden, hidden, bias=True),
        LinearShape("mlp.c_fc", inner, hidden, bias=True),
        LinearShape("mlp.c_proj", hidden, inner, bias=True),
    ]


def gpt_neox_linears(config: Config) -> list[LinearShape]:
    hidden, inner = hidden_size(config), dimension(config, "intermediate_size")
    bias = flag(config, "attention_bias", True)
    return [
        LinearShape("attention.query_key_value", 3 * hidden, hidden, bias),
        LinearShape("attention.dense", hidden, hidden, bias),
        LinearShape("mlp.dense_h_to_4h", inner, hidden, bias=True),
        LinearShape("mlp.dense_4h_to_h", hidden, inner, bias=True),
    ]


def mixtral_linears(config: Config) -> list[LinearShape]:
    """As transformers before 5 holds them: two-dimensional weights for each expert, and the router, all quantized."""
    attention = separate_linears(Heads(kv_default=8))(config)[:4]
    hidden, inner, moe = hidden_size(config), dimension(config, "intermediate_size"), "block_sparse_moe"
    count, _ = mixtral_experts(config)
    experts = [
        LinearShape(f"{moe}.experts.{expert}.{name}", *shape)
        for expert in range(count)
        for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden)))
    ]
    return [*attention, LinearShape(f"{moe}.gate", count, hidden), *experts]


def mixtral_experts(config: Config) -> tuple[int, int]:
    count = dimension(config, "num_local_experts", default=8)
    return count, dimension(config, "num_experts_per_tok", default=2, limit=count)


def gpt_bigcode_linears(config: Config) -> list[LinearShape]:
    """With `multi_query` keys and values of one head only follow the queries in the fused projection."""
    hidden = hidden_size(config)
    key = hidden // head_count(config) if flag(config, "multi_query", True) else hidden
    _, attention_out, mlp_in, mlp_out = gpt2_linears(config)
    return [LinearShape("attn.c_attn", hidden + 2 * key, hidden, bias=True), attention_out, mlp_in, mlp_out]


def phi_linears(config: Config) -> list[LinearShape]:
    hidden, inner = hidden_size(config), dimension(config, "intermediate_size")
    query, key, _ = Heads().widths(config)
    return [
        LinearShape("self_attn.q_proj", query, hidden, bias=True),
        LinearShape("self_attn.k_proj", key, hidden, bias=True),
        LinearShape("self_attn.v_proj", key, hidden, bias=True),
        LinearShape("self_attn.dense", hidden, query, bias=True),
        LinearShape("mlp.fc1", inner, hidden, bias=True),
        LinearShape("mlp.fc2", hidden, inner, bias=True),
    ]


def rms_norms(*names: str) -> Callable[[Config], list[TensorShape]]:
    """Norms over the hidden width with a weight only."""
    return lambda config: [(f"{name}.weight", (hidden_size(config),)) for name in names]


def layer_norms(*names: str) -> Callable[[Config], list[TensorShape]]:
    """Norms over the hidden width with weight and bias."""
    return lambda config: [(f"{name}.{part}", (hidden_size(config),)) for name in names for part in ("weight", "bias")]


def with_head_norms(heads: Heads, *names: str) -> Callable[[Config], list[TensorShape]]:
    """RMS norms over the hidden width, and one each over the width of a query and of a key head (Qwen 3, Gemma 3)."""

    def tensors(config: Config) -> list[TensorShape]:
        head_dim = heads.widths(config)[2]
        normed = [(f"self_attn.{name}.weight", (head_dim,)) for name in ("q_norm", "k_norm")]
        return [*normed, *rms_norms(*names)(config)]

    return tensors


def olmo2_tensors(config: Config) -> list[TensorShape]:
    """OLMo 2 norms the whole query and key, and only the outputs of attention and MLP."""
    query, key, _ = Heads().widths(config)
    normed = [("self_attn.q_norm.weight", (query,)), ("self_attn.k_norm.weight", (key,))]
    return [*normed, *rms_norms("post_attention_layernorm", "post_feedforward_layernorm")(config)]


def gpt2_outer(config: Config) -> list[TensorShape]:
    positions = dimension(config, "n_positions", "max_position_embeddings", default=1024)
    return [
        ("transformer.wpe.weight", (positions, hidden_size(config))),
        *layer_norms("transformer.ln_f")(config),
    ]


def sliding_window(default: int | None) -> Callable[[Config], int | None]:
    """`sliding_window`; null means none, and its absence the default."""
    return lambda config: (
        None if config.get("sliding_window", default) is None else dimension(config, "sliding_window", default=default)
    )
