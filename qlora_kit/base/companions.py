"""What a model folder holds besides weights and config, and goes with them wherever they are rewritten.

Imported by: base.quantize_model, export.output.
"""

from __future__ import annotations

from pathlib import Path

from qlora_kit import files

GENERATION = ("generation_config.json",)
TOKENIZER = (  # and chat template
    "tokenizer*",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)


def carry(folder: Path, out: Path, patterns: tuple[str, ...] = TOKENIZER + GENERATION) -> None:
    """Copy them from a model's folder into another, durably."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_file():
                files.write_bytes(out / path.name, path.read_bytes())
