"""Tensors outside the linears of the blocks, as active adapters have them: put in the base's place, and back.

How: an adapter's `TensorUpdate`s are applied once, when it is chosen, to the base's tensor in fp32 and rounded to its
dtype; the model then holds the result where it held the base's (a parameter, the bias of a linear, or the table that a
fetched embedding or head reads from, which then lives in host memory). The base's own are kept aside and come back.
What is trained stands there itself: a parameter, a `TrainedTable`, or a branch over the base's table (`tables`).
Memory: a changed tensor is there twice, but for a table that is trained whole: the base's own is given up for it.
Imported by: adapters.inject, adapters.store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.adapters.lora import LoRABranch
from qlora_kit.adapters.tables import BranchedTable, TrainedTable
from qlora_kit.adapters.updates import TensorUpdate
from qlora_kit.base.linear import FrozenLinear
from qlora_kit.base.loader import Base
from qlora_kit.base.vocabulary import FetchedEmbedding, FetchedHead, ResidentTable, Table, fetch_from, fetch_no_more
from qlora_kit.errors import ModelError

Update = TensorUpdate | LoRABranch | TrainedTable | nn.Parameter  # the last three are trained


def put_tensors(base: Base, names: Sequence[str]) -> None:
    """Give the model its tensors as these adapters have them.

    Raises: ModelError: two of the adapters have different values for a tensor, which cannot be added up; or the base's
        own of one was given up.
    """
    wanted: dict[str, list[Update]] = {}
    for name in names:
        for tensor, update in base.updates.get(name, {}).items():
            wanted.setdefault(tensor, []).append(update)
    for tensor, updates in wanted.items():
        if len(updates) > 1 and not all(_adds(update) for update in updates):
            raise ModelError(f"{tensor}: more than one of the adapters {list(names)} replaces it; choose one of them")
    for tensor, own in base.replaced.items():
        if own is None and not any(isinstance(update, TrainedTable) for update in wanted.get(tensor, [])):
            raise ModelError(f"{tensor}: is being trained, and the base's own was given up for it; load the base again")
    while base.replaced:
        tensor, own = base.replaced.popitem()
        if own is not None:
            _set(base.model, tensor, own)
    for tensor, updates in wanted.items():
        own = _get(base.model, tensor)
        base.replaced[tensor] = None if isinstance(updates[0], TrainedTable) else own
        _set(base.model, tensor, _updated(own, updates))


def tensor_of(base: Base, name: str) -> Any:
    """What the model has under a name now: a tensor, or of an embedding or head the table that it reads from."""
    return _get(base.model, name)


def trained_tensor(base: Base, name: str, value: Any) -> nn.Parameter | TrainedTable:
    """A copy of `value`, to be trained in the place of the base's tensor.

    Raises: ModelError: it is an embedding or head that does not live on the device.
    """
    row = base.architecture
    if isinstance(value, Table) or isinstance(_get(base.model, name), Table):
        raise ModelError(f"{name} is trained whole, so it lives on the device; set memory.embeddings to device or auto")
    copy = value.detach().to(base.device, base.dtype, copy=True)
    is_table = name in (f"{row.embedding}.weight", f"{row.head}.weight")
    return TrainedTable(copy) if is_table else nn.Parameter(copy)


def _adds(update: Update) -> bool:
    """Whether an update is a plain LoRA branch that is not trained, so that it can be added to others."""
    if not isinstance(update, TensorUpdate):
        return False
    branch = update.branch
    return update.value is None and update.listed is None and branch is not None and branch.magnitude is None


def _updated(original: Any, updates: Sequence[Update]) -> Any:
    """What stands for `original`, of the same kind, dtype and device."""
    if isinstance(updates[0], LoRABranch):
        return BranchedTable(original if isinstance(original, Table) else ResidentTable(original), updates[0])
    if not isinstance(updates[0], TensorUpdate):
        return updates[0]
    if isinstance(original, Table):
        whole = original if original.host is not None else original.on_host()
        assert whole.host is not None
        host = _applied(whole.host, updates)
        host = host if host.device == original.device or host.is_pinned() else _pinned(host, original.device)
        return replace(original, host=host, entry=replace(original.entry, shape=tuple(host.shape)))
    value = _applied(original.detach(), updates)
    return nn.Parameter(value, requires_grad=False) if isinstance(original, nn.Parameter) else value


def _applied(value: Tensor, updates: Sequence[Update]) -> Tensor:
    new = value.to(torch.float32, copy=True)
    for update in updates:
        assert isinstance(update, TensorUpdate)
        new = update.apply(new)
    return new.to(value.dtype)


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory() if device.type != "cpu" else host


def _get(model: Any, name: str) -> Any:
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    return module.table if isinstance(module, FetchedEmbedding | FetchedHead) else getattr(module, leaf)


def _set(model: Any, name: str, value: Any) -> None:
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if isinstance(value, Table | TrainedTable | BranchedTable):
        fetch_from(model, name, value)
    elif isinstance(module, FetchedEmbedding | FetchedHead):
        fetch_no_more(model, name, value)
    elif isinstance(module, FrozenLinear):
        module.register_buffer(leaf, value)
    else:
        setattr(module, leaf, value)
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(value)
        elif isinstance(module, nn.Linear):
            module.out_features = len(value)
