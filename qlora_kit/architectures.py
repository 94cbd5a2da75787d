"""ARCHITECTURES: what each supported decoder is made of, as facts and small functions of its config.json.

Why: the planner must know every tensor before torch is imported, and the loader must refuse a base in which one is
missing, has another shape, or is unknown. Both read the same row, so they cannot drift apart.
How: the key is transformers' `model_type`; rows of PLANNED_ONLY are known to `plan --stack` alone, and nothing is
trained with them. Names inside a block are relative to it ("self_attn.q_proj"). Keys absent
from a config get the default of transformers' config class. A generic test compares every row with the state dict of
the model that transformers builds. To support another architecture, add a row. Imports no torch.
Imported by planning, base, adapters, training and export.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora_kit.errors import ModelError, nearest

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


@dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        blocks: path of the list of decoder blocks; block i is `{blocks}.{i}`.
        embedding: path of the token embedding, [vocabulary, hidden].
        linears: config -> the linears of ONE block, fused ones as they are stored.
        block_tensors: config -> what else a block holds (norms), names relative to the block.
        outer_tensors: config -> tensors outside the blocks, without embedding and head, absolute names.
        attention_in, attention_out: linears whose outputs feed attention (q, k, v or fused), and the one after it.
        mlp_in, mlp_out: linears before and after the activation function.
        mlp_saved: tensors of the MLP's width that autograd keeps between the two, the input of `mlp_out` not counted.
            3: gate, act(gate), up; 1: the input of a fused GELU; 4: of GPT-2's GELU, which is composed of small steps.
        layer_norm_copies: of layer norms, how many keep an input that is not the block's own; None: RMS norms.
        pre_norm: q, k and v read a normed copy of the block's input; otherwise (OLMo 2) that input itself.
        output_norm: the MLP's output is normed before it joins the residual stream (OLMo 2, Gemma).
        heads_first: q and k are normed head by head, all tokens at a time; attention's output is then copied.
        rotary: q and k are new tensors after rotary embeddings; otherwise views of what the projection made.
        eager_attention: transformers has no fused attention for it, so the scores exist (Gemma 2 caps them).
        window: config -> positions that (some) blocks look back, for which longer sequences need a mask; None: all.
        head: path of the output projection, [vocabulary, hidden]; the same tensor as the embedding when tied.
        tied_by_default: what an absent `tie_word_embeddings` means.
        transposed: weights are stored [in, out] (GPT-2's Conv1D).
        softcap_default: what an absent `final_logit_softcapping` means; None: logits are not capped.
        file_renames: (regular expression, replacement) for tensor names in checkpoints of older layouts.
        file_buffers: regular expression of tensors that old checkpoints hold although they are computed, not learned.
        experts: config -> (experts of an MLP, how many of them a token passes); (1, 1): a dense MLP.
    """

    blocks: str
    embedding: str
    linears: Callable[[Config], list[LinearShape]]
    block_tensors: Callable[[Config], list[TensorShape]]
    outer_tensors: Callable[[Config], list[TensorShape]]
    attention_in: tuple[str, ...]
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    mlp_saved: int = 3
    layer_norm_copies: int | None = None
    pre_norm: bool = True
    output_norm: bool = False
    heads_first: bool = False
    rotary: bool = True
    eager_attention: bool = False
    window: Callable[[Config], int | None] = lambda config: None
    head: str = "lm_head"
    tied_by_default: bool = False
    transposed: bool = False
    softcap_default: float | None = None
    file_renames: tuple[tuple[str, str], ...] = ()
    file_buffers: str = r"\.rotary_emb\.inv_freq$"
    experts: Callable[[Config], tuple[int, int]] = lambda config: (1, 1)

    @property
    def attention_linears(self) -> tuple[str, ...]:
        """Names of q, k, v and o (or their fused kin), usable as `adapter.target_modules`."""
        return (*self.attention_in, self.attention_out)

    def weight_shape(self, linear: LinearShape) -> tuple[int, int]:
        """The stored shape of a linear's weight."""
        shape = (linear.out_features, linear.in_features)
        return shape[::-1] if self.transposed else shape

    def name_in_model(self, name_in_file: str) -> str | None:
        """The model's name of a checkpoint's tensor; None: it is a computed buffer, to be passed over."""
        if re.search(self.file_buffers, name_in_file):
            return None
        for pattern, replacement in self.file_renames:
            name_in_file = re.sub(pattern, replacement, name_in_file)
        return name_in_file


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


def tied(config: Config) -> bool:
    """Whether head and embedding are one tensor.

    Raises: ModelError: unknown model_type.
    """
    return flag(config, "tie_word_embeddings", architecture_of(config, "config", planned_only=True).tied_by_default)


def final_softcap(config: Config) -> float | None:
    """The cap c of `c * tanh(logits / c)`, or None.

    Raises: ModelError: not a positive number.
    """
    row = architecture_of(config, "config", planned_only=True)
    value = config.get("final_logit_softcapping", row.softcap_default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ModelError(f"config field 'final_logit_softcapping': expected a positive number, found {value!r:.80}")
    return float(value)


def architecture_of(config: Config, source: str, *, planned_only: bool = False) -> Architecture:
    """The row of a config; `source` (a path or name) opens the message.

    Args:
        planned_only: also of an architecture that this kit cannot train.
    Raises: ModelError: no model_type, a multimodal wrapper, or an architecture without a row.
    """
    found = config.get("model_type")
    if not isinstance(found, str):
        raise ModelError(f"{source}: config has no 'model_type'; expected one of {', '.join(ARCHITECTURES)}")
    if isinstance(config.get("text_config"), Mapping):
        inner = config["text_config"].get("model_type", "unknown")
        known = "which is supported" if inner in ARCHITECTURES else "which is not supported either"
        raise ModelError(
            f"{source}: model_type {found!r:.80} is a multimodal wrapper around {inner!r:.80}, {known}; only text "
            f"models can be trained. Save its language model to a folder of its own, whose config.json has "
            f"the contents of 'text_config' at the top, and give that folder"
        )
    if found in PLANNED_ONLY:
        if planned_only:
            return PLANNED_ONLY[found]
        raise ModelError(
            f"{source}: model_type {found!r} cannot be trained by this kit; `qlora-kit plan --stack peft` says what it "
            f"takes elsewhere; trained are {', '.join(ARCHITECTURES)}"
        )
    if found not in ARCHITECTURES:
        hint = nearest(found, list(ARCHITECTURES))
        raise ModelError(
            f"{source}: model_type {found!r:.80} is not supported{hint}; one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[found]


# --------------------------------------------------------------------------------------- parts that rows share


@dataclass(frozen=True)
class _Heads:
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


def _separate_linears(
    heads: _Heads, qkv_bias: str | bool = False, output_bias: str | bool = False, mlp_bias: str | bool = False
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


def _phi3_linears(config: Config) -> list[LinearShape]:
    hidden, inner = hidden_size(config), dimension(config, "intermediate_size")
    query, key, _ = _Heads().widths(config)
    return [
        LinearShape("self_attn.qkv_proj", query + 2 * key, hidden),
        LinearShape("self_attn.o_proj", hidden, query),
        LinearShape("mlp.gate_up_proj", 2 * inner, hidden),
        LinearShape("mlp.down_proj", hidden, inner),
    ]


def _gpt2_linears(config: Config) -> list[LinearShape]:
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


def _gpt_neox_linears(config: Config) -> list[LinearShape]:
    hidden, inner = hidden_size(config), dimension(config, "intermediate_size")
    bias = flag(config, "attention_bias", True)
    return [
        LinearShape("attention.query_key_value", 3 * hidden, hidden, bias),
        LinearShape("attention.dense", hidden, hidden, bias),
        LinearShape("mlp.dense_h_to_4h", inner, hidden, bias=True),
        LinearShape("mlp.dense_4h_to_h", hidden, inner, bias=True),
    ]


def _mixtral_linears(config: Config) -> list[LinearShape]:
    """As transformers before 5 holds them: two-dimensional weights for each expert, and the router, all quantized."""
    attention = _separate_linears(_Heads(kv_default=8))(config)[:4]
    hidden, inner, moe = hidden_size(config), dimension(config, "intermediate_size"), "block_sparse_moe"
    count, _ = _mixtral_experts(config)
    experts = [
        LinearShape(f"{moe}.experts.{expert}.{name}", *shape)
        for expert in range(count)
        for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden)))
    ]
    return [*attention, LinearShape(f"{moe}.gate", count, hidden), *experts]


def _mixtral_experts(config: Config) -> tuple[int, int]:
    count = dimension(config, "num_local_experts", default=8)
    return count, dimension(config, "num_experts_per_tok", default=2, limit=count)


def _gpt_bigcode_linears(config: Config) -> list[LinearShape]:
    """With `multi_query` keys and values of one head only follow the queries in the fused projection."""
    hidden = hidden_size(config)
    key = hidden // head_count(config) if flag(config, "multi_query", True) else hidden
    _, attention_out, mlp_in, mlp_out = _gpt2_linears(config)
    return [LinearShape("attn.c_attn", hidden + 2 * key, hidden, bias=True), attention_out, mlp_in, mlp_out]


def _phi_linears(config: Config) -> list[LinearShape]:
    hidden, inner = hidden_size(config), dimension(config, "intermediate_size")
    query, key, _ = _Heads().widths(config)
    return [
        LinearShape("self_attn.q_proj", query, hidden, bias=True),
        LinearShape("self_attn.k_proj", key, hidden, bias=True),
        LinearShape("self_attn.v_proj", key, hidden, bias=True),
        LinearShape("self_attn.dense", hidden, query, bias=True),
        LinearShape("mlp.fc1", inner, hidden, bias=True),
        LinearShape("mlp.fc2", hidden, inner, bias=True),
    ]


def _rms_norms(*names: str) -> Callable[[Config], list[TensorShape]]:
    """Norms over the hidden width with a weight only."""
    return lambda config: [(f"{name}.weight", (hidden_size(config),)) for name in names]


def _layer_norms(*names: str) -> Callable[[Config], list[TensorShape]]:
    """Norms over the hidden width with weight and bias."""
    return lambda config: [(f"{name}.{part}", (hidden_size(config),)) for name in names for part in ("weight", "bias")]


def _with_head_norms(heads: _Heads, *names: str) -> Callable[[Config], list[TensorShape]]:
    """RMS norms over the hidden width, and one each over the width of a query and of a key head (Qwen 3, Gemma 3)."""

    def tensors(config: Config) -> list[TensorShape]:
        head_dim = heads.widths(config)[2]
        normed = [(f"self_attn.{name}.weight", (head_dim,)) for name in ("q_norm", "k_norm")]
        return [*normed, *_rms_norms(*names)(config)]

    return tensors


def _olmo2_tensors(config: Config) -> list[TensorShape]:
    """OLMo 2 norms the whole query and key, and only the outputs of attention and MLP."""
    query, key, _ = _Heads().widths(config)
    normed = [("self_attn.q_norm.weight", (query,)), ("self_attn.k_norm.weight", (key,))]
    return [*normed, *_rms_norms("post_attention_layernorm", "post_feedforward_layernorm")(config)]


def _gpt2_outer(config: Config) -> list[TensorShape]:
    positions = dimension(config, "n_positions", "max_position_embeddings", default=1024)
    return [
        ("transformer.wpe.weight", (positions, hidden_size(config))),
        *_layer_norms("transformer.ln_f")(config),
    ]


def _window(default: int | None) -> Callable[[Config], int | None]:
    """`sliding_window`; null means none, and its absence the default."""
    return lambda config: (
        None if config.get("sliding_window", default) is None else dimension(config, "sliding_window", default=default)
    )


_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_GEMMA_HEADS = _Heads(kv_default=4, head_dim_default=256)
_QWEN3_HEADS = _Heads(kv_default=32, head_dim_default=128)


_BIAS = "attention_bias"
_LLAMA = Architecture(
    blocks="model.layers",
    embedding="model.embed_tokens",
    linears=_separate_linears(_Heads(), _BIAS, _BIAS, mlp_bias="mlp_bias"),
    block_tensors=_rms_norms(*_TWO_NORMS),
    outer_tensors=_rms_norms("model.norm"),
    attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, linears=_separate_linears(_Heads(kv_default=8)), window=_window(4096)),
    "qwen2": replace(_LLAMA, linears=_separate_linears(_Heads(kv_default=32), qkv_bias=True)),
    "qwen3": replace(
        _LLAMA,
        linears=_separate_linears(_QWEN3_HEADS, _BIAS, _BIAS),
        block_tensors=_with_head_norms(_QWEN3_HEADS, *_TWO_NORMS),
    ),
    "gemma2": replace(
        _LLAMA,
        linears=_separate_linears(_GEMMA_HEADS, _BIAS, _BIAS),
        block_tensors=_rms_norms(*_FOUR_NORMS),
        tied_by_default=True,
        output_norm=True,
        softcap_default=30.0,
        eager_attention=True,
        window=_window(4096),
    ),
    "gemma3_text": replace(
        _LLAMA,
        linears=_separate_linears(_GEMMA_HEADS, _BIAS, _BIAS),
        block_tensors=_with_head_norms(_GEMMA_HEADS, *_FOUR_NORMS),
        tied_by_default=True,
        output_norm=True,
        heads_first=True,
        window=_window(4096),
    ),
    "phi3": replace(
        _LLAMA,
        linears=_phi3_linears,
        attention_in=("self_attn.qkv_proj",),
        mlp_in=("mlp.gate_up_proj",),
        window=_window(None),
    ),
    "olmo2": replace(
        _LLAMA,
        linears=_separate_linears(_Heads(), _BIAS, _BIAS),
        block_tensors=_olmo2_tensors,
        pre_norm=False,
        output_norm=True,
    ),
    "gpt2": Architecture(
        blocks="transformer.h",
        embedding="transformer.wte",
        linears=_gpt2_linears,
        block_tensors=_layer_norms("ln_1", "ln_2"),
        outer_tensors=_gpt2_outer,
        attention_in=("attn.c_attn",),
        attention_out="attn.c_proj",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        mlp_saved=4,
        layer_norm_copies=1,
        rotary=False,
        tied_by_default=True,
        transposed=True,
        file_renames=((r"^(h|wte|wpe|ln_f)\.", r"transformer.\1."),),
        file_buffers=r"\.attn\.(masked_)?bias$",
    ),
    "gpt_neox": Architecture(
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        linears=_gpt_neox_linears,
        block_tensors=_layer_norms(*_TWO_NORMS),
        outer_tensors=_layer_norms("gpt_neox.final_layer_norm"),
        attention_in=("attention.query_key_value",),
        attention_out="attention.dense",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
        mlp_saved=1,
        layer_norm_copies=0,
        file_renames=((r"^embed_out\.", "lm_head."),),
        file_buffers=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
    ),
}

# Known by their shapes only: what they take in other stacks can be planned, but nothing here trains them.
_GPT2 = ARCHITECTURES["gpt2"]
PLANNED_ONLY: dict[str, Architecture] = {
    "mixtral": replace(
        _LLAMA,
        linears=_mixtral_linears,
        mlp_in=("block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.0.w3"),
        mlp_out="block_sparse_moe.experts.0.w2",
        experts=_mixtral_experts,
    ),
    "gpt_bigcode": replace(_GPT2, linears=_gpt_bigcode_linears, mlp_saved=1, transposed=False),
    "gemma": replace(_LLAMA, linears=_separate_linears(_Heads(16, 256)), tied_by_default=True),
    "phi": replace(
        _LLAMA,
        linears=_phi_linears,
        block_tensors=_layer_norms("input_layernorm"),
        outer_tensors=lambda config: [
            *_layer_norms("model.final_layernorm")(config),
            ("lm_head.bias", (vocabulary_size(config),)),
        ],
        attention_out="self_attn.dense",
        mlp_in=("mlp.fc1",),
        mlp_out="mlp.fc2",
        mlp_saved=1,
        layer_norm_copies=0,
    ),
}
