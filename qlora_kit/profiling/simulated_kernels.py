"""What the simulated accelerator computes otherwise than the CPU does.

- Attention is one fused kernel with its own backward, as on a GPU: no [T, T] scores. It is the CPU's flash kernel,
  taken exactly when the CPU would take it, so that results are bit-identical.
- Small steps of a backward that GPUs and CPUs fuse, and other devices of torch do not, are fused.
- Where only shapes are known, the few kernels whose result shape or value for the host depends on data assume the
  largest (every position is non-zero, every mask lets all through), and 1.
Imported by: simulated_tensor, simulated_device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
FUSED = ("silu_backward", "mish_backward")
FLASH = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
REAL_BYTES = 1 << 12  # with shapes only, storages up to this size keep their values: code tables, scalars
REAL_STEERING_BYTES = 1 << 20  # so do ids, positions and masks, which steer the code
STEERING = (torch.bool, torch.int32, torch.int64)


@dataclass(frozen=True)
class Schema:
    """What torch says of a kernel.

    Attributes:
        written: positions and names of the arguments that it writes.
        is_view: its result is a view: it touches no memory.
        reads: it looks at values, not at shapes alone.
    """

    written: frozenset[int | str]
    is_view: bool
    reads: bool


@functools.cache
def schema_of(func: Any) -> Schema:
    """The schema of an operator overload."""
    arguments, returns, name = func._schema.arguments, func._schema.returns, func._opname
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    names = [arguments[i].name for i in written]
    is_view = not written and any(value.alias_info is not None for value in returns)
    return Schema(frozenset([*written, *names]), is_view, not name.endswith("_like") and not name.startswith("new_"))


def keeps_values(size_bytes: int, dtype: torch.dtype) -> bool:
    """Whether a new storage is computed for real even when only shapes are wanted."""
    return size_bytes <= (REAL_STEERING_BYTES if dtype in STEERING else REAL_BYTES)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention of device tensors, [B, H, T, D] each; runs above autograd."""
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    hosts: list[Any] = [_host_twin(tensor) for tensor in (query, key, value, attn_mask)]
    choose: Any = torch._fused_sdp_choice
    if choose(*hosts, dropout_p, is_causal, **options) != FLASH:
        return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, **options)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # as torch does on every device
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _host_twin(tensor: Tensor | None) -> Tensor | None:
    """A host tensor of the same shape, for a choice that looks at shapes; its memory is never touched."""
    if tensor is None:
        return None
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return twin.requires_grad_(tensor.requires_grad)


def _nonzero(tensor: Tensor) -> Tensor:
    return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.int64)


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks as the positions that they may choose."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found += [index.new_empty(index.numel(), dtype=torch.int64)] * index.dim()
        else:
            found.append(index)
    return found


# Kernel -> what takes its place on meta tensors.
SHAPES_ONLY: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: lambda tensor: torch.ones((), dtype=tensor.dtype).item(),
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: lambda tensor, mask: tensor.new_empty(torch.broadcast_shapes(tensor.shape, mask.shape)),
    aten.index.Tensor: lambda tensor, indices: aten.index.Tensor(tensor, _positions(indices)),
    aten.index_put_.default: lambda tensor, *_, **__: tensor,
    aten._index_put_impl_.default: lambda tensor, *_, **__: tensor,
    aten.equal.default: lambda *_: True,
}


def _dequantize_into(*inputs_and_out: Any) -> None:
    *inputs, out = inputs_and_out
    if not out.is_meta:
        out.copy_(torch.ops.bitsandbytes.dequantize_4bit(*inputs))


# Name of a kernel that neither CPU nor meta tensors have -> what takes its place.
LACKING: dict[str, Callable[..., Any]] = {"bitsandbytes::dequantize_4bit.out": _dequantize_into}

# The host waits for their result.
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
}

# Their lists of indices may lie on the host, as on CUDA.
HOST_INDICES = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
