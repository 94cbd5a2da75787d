"""The quickstart's GGUF file read back: every tensor against the merged folder, bit for bit.

How: our own table of names and rows (`tools.quickstart.model`), not the exporter's, and no torch. That llama.cpp
computes the same from it is `tools.prove_gguf`'s to say. Called by `tools.quickstart`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.quickstart.model import hf_name, rotary_rows
from tools.quickstart.packages import SetupError


def read_back(gguf: Path, merged: Path) -> str:
    """`272 of 272 tensors bit-equal to the merged model`.

    Raises: SetupError: one is missing or differs.
    """
    from gguf import GGUFReader
    from safetensors import safe_open

    config, tensors = json.loads((merged / "config.json").read_text()), GGUFReader(gguf).tensors
    with safe_open(merged / "model.safetensors", "np") as folder:
        missing = set(folder.keys()) ^ {hf_name(tensor.name) for tensor in tensors}
        same = [] if missing else [_same(tensor, folder.get_tensor(hf_name(tensor.name)), config) for tensor in tensors]
    told = f"{sum(same)} of {len(tensors)} tensors bit-equal to the merged model"
    if not same or not all(same):
        raise SetupError(f"{gguf}: {told}; remove it and run again")
    return told


def _same(tensor: Any, kept: Any, config: dict[str, Any]) -> bool:
    """Vectors are fp32 in the file and fp16 in the folder: the same values once rounded."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(tensor.name.split(".")[-2])
    values = tensor.data[rotary_rows(config[heads], config["head_dim"])] if heads else tensor.data
    equal = values.astype(kept.dtype).view("uint16") == kept.view("uint16")
    return values.shape == kept.shape and bool(equal.all())
