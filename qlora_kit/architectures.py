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

from qlora_kit.architecture_parts import (
    Config,
    Heads,
    LinearShape,
    TensorShape,
    flag,
    gpt2_linears,
    gpt2_outer,
    gpt_bigcode_linears,
    gpt_neox_linears,
    layer_norms,
    mixtral_experts,
    mixtral_linears,
    olmo2_tensors,
    phi3_linears,
    phi_linears,
    rms_norms,
    separate_linears,
    sliding_window,
    vocabulary_size,
    with_head_norms,
)
from qlora_kit.errors import ModelError, nearest


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


# ------------------------------------------------------------------------------------------------ finding a row


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


# ----------------------------------------------------------------------------------------------------- the rows


_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_GEMMA_HEADS = Heads(kv_default=4, head_dim_default=256)
_QWEN3_HEADS = Heads(kv_default=32, head_dim_default=128)


_BIAS = "attention_bias"
_LLAMA = Architecture(
    blocks="model.layers",
    embedding="model.embed_tokens",
    linears=separate_linears(Heads(), _BIAS, _BIAS, mlp_bias="mlp_bias"),
    block_tensors=rms_norms(*_TWO_NORMS),
    outer_tensors=rms_norms("model.norm"),
    attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, linears=separate_linears(Heads(kv_default=8)), window=sliding_window(4096)),
    "qwen2": replace(_LLAMA, linears=separate_linears(Heads(kv_default=32), qkv_bias=True)),
    "qwen3": replace(
        _LLAMA,
        linears=separate_linears(_QWEN3_HEADS, _BIAS, _BIAS),
        block_tensors=with_head_norms(_QWEN3_HEADS, *_TWO_NORMS),
    ),
    "gemma2": replace(
        _LLAMA,
        linears=separate_linears(_GEMMA_HEADS, _BIAS, _BIAS),
        block_tensors=rms_norms(*_FOUR_NORMS),
        tied_by_default=True,
        output_norm=True,
        softcap_default=30.0,
        eager_attention=True,
        window=sliding_window(4096),
    ),
    "gemma3_text": replace(
        _LLAMA,
        linears=separate_linears(_GEMMA_HEADS, _BIAS, _BIAS),
        block_tensors=with_head_norms(_GEMMA_HEADS, *_FOUR_NORMS),
        tied_by_default=True,
        output_norm=True,
        heads_first=True,
        window=sliding_window(4096),
    ),
    "phi3": replace(
        _LLAMA,
        linears=phi3_linears,
        attention_in=("self_attn.qkv_proj",),
        mlp_in=("mlp.gate_up_proj",),
        window=sliding_window(None),
    ),
    "olmo2": replace(
        _LLAMA,
        linears=separate_linears(Heads(), _BIAS, _BIAS),
        block_tensors=olmo2_tensors,
        pre_norm=False,
        output_norm=True,
    ),
    "gpt2": Architecture(
        blocks="transformer.h",
        embedding="transformer.wte",
        linears=gpt2_linears,
        block_tensors=layer_norms("ln_1", "ln_2"),
        outer_tensors=gpt2_outer,
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
        linears=gpt_neox_linears,
        block_tensors=layer_norms(*_TWO_NORMS),
        outer_tensors=layer_norms("gpt_neox.final_layer_norm"),
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
        linears=mixtral_linears,
        mlp_in=("block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.0.w3"),
        mlp_out="block_sparse_moe.experts.0.w2",
        experts=mixtral_experts,
    ),
    "gpt_bigcode": replace(_GPT2, linears=gpt_bigcode_linears, mlp_saved=1, transposed=False),
    "gemma": replace(_LLAMA, linears=separate_linears(Heads(16, 256)), tied_by_default=True),
    "phi": replace(
        _LLAMA,
        linears=phi_linears,
        block_tensors=layer_norms("input_layernorm"),
        outer_tensors=lambda config: [
            *layer_norms("model.final_layernorm")(config),
            ("lm_head.bias", (vocabulary_size(config),)),
        ],
        attention_out="self_attn.dense",
        mlp_in=("mlp.fc1",),
        mlp_out="mlp.fc2",
        mlp_saved=1,
        layer_norm_copies=0,
    ),
}
