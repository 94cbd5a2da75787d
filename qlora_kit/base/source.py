"""A model's folder: where it is, and what tells its weights from those of another.

Imported by: base.loader, base.quantize_model, training, export, the commands, tools.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from qlora_kit.base.prequantized import FINGERPRINT
from qlora_kit.base.shards import Shards
from qlora_kit.errors import ModelError
from qlora_kit.planning.shapes import read_config

SAMPLE_BYTES = 4096  # of each tensor, twice, in the fingerprint


def resolve_folder(path: str, revision: str | None = None) -> Path:
    """The local folder of a model: `path` itself, or a hub id's snapshot, downloaded if need be.

    Raises: ModelError: neither a folder nor a hub id that can be had.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ModelError(f"{path}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        found = snapshot_download(
            path, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
        )
    except Exception as problem:  # the hub client raises many kinds
        reason = str(problem).strip().splitlines()[0]
        raise ModelError(f"{path}: no such folder here, and the hub did not give it: {reason}") from problem
    return Path(found)


def libraries(model: str, revision: str | None = None) -> tuple[str, ...]:
    """Modules that a run of the model imports sooner or later; to be imported before its memory is counted."""
    model_type = read_config(model, revision)[0]["model_type"]
    name = model_type.removesuffix("_text")
    return (
        "transformers.models.auto.modeling_auto",
        f"transformers.models.{name}.modeling_{name}",
        "transformers.models.auto.tokenization_auto",
        "bitsandbytes.optim",
    )


def fingerprint(shards: Shards) -> str:
    """Hex digest that tells two bases apart: every name, dtype and shape, and 8 KiB of each tensor.

    A fine-tuned copy differs in nearly every tensor, so samples are enough; reading 140 GB would take minutes.
    """
    digest = hashlib.sha256()
    for name, entry in sorted(shards.entries.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape};".encode())
        size = min(SAMPLE_BYTES, entry.size_bytes)
        with open(entry.path, "rb") as file:
            for start in (0, (entry.size_bytes - size) // 2):
                digest.update(os.pread(file.fileno(), size, entry.offset + start))
    return digest.hexdigest()[:32]


def base_fingerprint(shards: Shards) -> str:
    """The fingerprint of a base, or of the one that a 4-bit checkpoint of this kit was made from."""
    recorded = shards.metadata.get(FINGERPRINT, "")
    return recorded if re.fullmatch("[0-9a-f]{32}", recorded) else fingerprint(shards)
