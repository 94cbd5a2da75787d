"""What a model folder holds besides weights and config, and goes with them wherever they are rewritten.

Imported by: base.prequantized, export.merge.
"""

from __future__ import annotations

from pathlib import Path

from qlora_kit import files

# Tokenizer, chat template, generation settings.
CARRIED = (
    "tokenizer*",
    "*.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)


def carry(folder: Path, out: Path) -> None:
    """Copy them from a model's folder into another, durably."""
    for pattern in CARRIED:
        for path in folder.glob(pattern):
            if path.is_file():
                files.write_bytes(out / path.name, path.read_bytes())
