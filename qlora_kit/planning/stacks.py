"""STACKS: what other training stacks do with memory, one row of facts each, read from their source.

Why: `plan --stack peft` shows what moving to this kit saves, and published byte-exact peaks of these stacks show
whether the formulas are right (`tools/check_published.py`). How: a fact is a byte count or a yes and no that the source
of the named versions settles; docs/memory.md derives each. PUBLISHED holds older versions and other stacks, which
published figures name. No constant is fitted to a figure. Imports no torch. Imported by planning/stack_* and tools.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Stack:
    """One row.

    Attributes:
        source: the versions that the facts were read from.
        adapter_bytes: of a trained weight and of its gradient.
        counts_paged: paged optimizer state counts (it does not where torch's allocator is asked).
        upcasts: which unquantized tensors of a 4-bit base become fp32: none, the norms, or all. fp32 norms make the
            residual stream fp32, and the outputs of 4-bit linears that read it.
        autocasts: layer norms run in fp32, and an adapter's input is cast to bf16 where it is not.
        recomputes: gradient checkpointing is to be had; otherwise the recipe's switch is ignored.
        keeps_output: a block that is run again keeps its output while its backward runs (reentrant checkpointing).
        keeps_inputs: 4-bit products keep their inputs, until the graph is gone (bitsandbytes before 0.43.2).
        keeps_graph: the step's graph, and with it these inputs, is still there during the next forward.
        offloads_inputs: inputs of recomputed blocks leave the device; one is there.
        fused_norms: an RMS norm keeps its input as it is, instead of an fp32 copy.
        fused_branches: q, k, v and o with their adapters are fused functions, where the base is quantized; gate, up and
            down too, where all three have one.
        fused_swiglu: gate and up are kept, act(gate) is not, and their gradients take their place.
        fused_head: projection and loss by chunks of tokens, with so many bytes a logit of a chunk; None: all at once.
        repeats_heads: model types whose key and value heads are repeated to the number of query heads.
        masks: attention masks exist as in transformers' sdpa; otherwise (FlashAttention 2) none do.
        eager: attention is not fused: softmax in fp32, and that in bf16, of every score.
        loss_forward, loss_backward: bytes a logit at the highest point of the loss and of its backward.
        bigcode_loss: loss_forward of gpt_bigcode, which has a loss of its own.
        litgpt: litgpt's own model: `planning/stack_litgpt`.
    """

    source: str
    adapter_bytes: int = 4
    counts_paged: bool = True
    upcasts: Literal["none", "norms", "all"] = "none"
    autocasts: bool = True
    recomputes: bool = True
    keeps_output: bool = True
    keeps_inputs: bool = False
    keeps_graph: bool = False
    offloads_inputs: bool = False
    fused_norms: bool = False
    fused_branches: bool = False
    fused_swiglu: bool = False
    fused_head: int | None = None
    repeats_heads: frozenset[str] = frozenset()
    masks: bool = False
    eager: bool = False
    loss_forward: int = 14
    loss_backward: int = 12
    bigcode_loss: int = 12
    litgpt: bool = False


# transformers 4.48: bf16 logits, held by the caller (2), `.float()` (4), the shifted copy (4), log-softmax (4).
# Backward: log-softmax (4), the gradient of nll_loss (4), that of log-softmax (4).
_TF448 = Stack("transformers 4.48.1, peft 0.13.2, trl 0.13.0, bitsandbytes 0.43.3, torch 2.4.1, flash-attn 2.7.3")
# Before 4.46 `logits = logits.float()` replaces the bf16 logits. Mistral's FlashAttention path repeats heads.
_TF445 = replace(
    _TF448,
    source="transformers 4.44.2 and 4.45.2, peft 0.12 and 0.13, trl 0.10 and 0.11, bitsandbytes 0.43.3, torch 2.4.1",
    loss_forward=12,
    repeats_heads=frozenset({"mistral"}),
)
# fms-acceleration-foak: triton cross entropy writes the gradient into the shifted fp32 copy (4), the logits beside it
# (4, and 2 more of bf16 in transformers 4.48); the slice's backward needs a second fp32 tensor (4). gpt_bigcode's
# logits are bf16, shifted (2 + 2), and accelerate turns the output into fp32 (4).
_FOAK: dict[str, Any] = {"fused_norms": True, "fused_branches": True, "loss_backward": 8, "bigcode_loss": 8}

_UNSLOTH = Stack("unsloth 2024.8, accelerate", **(_FOAK | {"loss_backward": 6}), loss_forward=6, offloads_inputs=True)
# Mid 2023, when 4-bit training was new: no fused attention yet, and k-bit preparation makes all fp32.
_TF430 = replace(_TF445, source="transformers 4.30, bitsandbytes 0.39", upcasts="all", keeps_inputs=True, eager=True)
_TUNE = Stack("torchtune 0.3", adapter_bytes=2, autocasts=False, keeps_output=False, loss_forward=4, loss_backward=4)

PUBLISHED: dict[str, Stack] = {
    "tf4.48": _TF448,
    "tf4.48-kbit": replace(_TF448, upcasts="norms"),
    "tf4.48-foak": replace(_TF448, **_FOAK, loss_forward=10),
    "tf4.45": _TF445,
    "tf4.45-kbit": replace(_TF445, upcasts="norms"),
    "tf4.45-foak": replace(_TF445, **_FOAK, loss_forward=8),
    "tf4.45-foak-liger": replace(_TF445, **_FOAK, fused_head=6),
    "tf4.48-foak-liger": replace(_TF448, **_FOAK, fused_head=6),
    # fp32 logits, which the notebook holds (4); their mean's backward makes an fp32 gradient (4) and a bf16 one (2).
    "fsdp_qlora-notebook": Stack(
        "AnswerDotAI/fsdp_qlora profiling notebook: transformers 4.38, bitsandbytes 0.42, no autocast, no loss",
        adapter_bytes=2,
        autocasts=False,
        keeps_output=False,
        keeps_inputs=True,
        loss_forward=6,
        loss_backward=10,
    ),
    # Full fp32 logits, shifted. Since August 2024 in 8 chunks that are let go one by one: bf16 logits (2), of which a
    # chunk in fp32 with its log-softmax and gradient (12 / 8).
    "torchtune": replace(_TF445, source="torchtune 0.1", adapter_bytes=2, autocasts=False, keeps_output=False),
    "torchtune-chunked": _TUNE,
    "torchtune-chunked-offload": replace(_TUNE, offloads_inputs=True),
    # Block inputs wait in host memory. The loss works on 16-bit logits in place (2), and accelerate turns those that
    # the model returns into fp32 (4).
    "unsloth": _UNSLOTH,
    "unsloth-cce": replace(_UNSLOTH, source="unsloth with Apple's cut cross entropy", fused_head=0),
    # Norms are turned back into bf16 for FlashAttention; cut cross entropy makes no logits.
    "axolotl": replace(_TF448, source="axolotl 0.12"),
    "axolotl-cce": replace(_TF448, source="axolotl 0.12 with cut cross entropy", fused_head=0),
    "tf4.30": _TF430,
    # qlora.py turns adapters, embedding and head back into bf16.
    "qlora-paper": replace(_TF430, source="artidoro/qlora", upcasts="norms", adapter_bytes=2),
}

STACKS: dict[str, Stack] = {
    # No shifted copy of logits any more (labels are shifted): bf16 (2), fp32 (4), log-softmax (4).
    "peft": Stack(
        "transformers 5.23, peft 0.21.2 with prepare_model_for_kbit_training, Trainer in bf16, bitsandbytes 0.50",
        upcasts="all",
        keeps_output=False,
        masks=True,
        loss_forward=10,
    ),
    "peft-liger": Stack(
        "the same with liger-kernel 0.8.5: RMS norm, SwiGLU, RoPE, fused linear cross entropy",
        upcasts="all",
        keeps_output=False,
        masks=True,
        fused_norms=True,
        fused_swiglu=True,
        fused_head=2,
    ),
    "litgpt": Stack(
        "litgpt 0.4.0, lightning 2.1, bitsandbytes 0.42, torch 2.3",
        adapter_bytes=2,
        counts_paged=False,
        autocasts=False,
        recomputes=False,
        keeps_inputs=True,
        keeps_graph=True,
        litgpt=True,
    ),
}
# The longest sample comes first and no later one is as long, so no graph of that size is left from a step before.
PUBLISHED["litgpt-longest-first"] = replace(STACKS["litgpt"], keeps_graph=False)


def find_stack(name: str) -> Stack:
    """The row of that name, of STACKS or PUBLISHED. Raises: KeyError: there is none."""
    return STACKS.get(name) or PUBLISHED[name]
