"""Options that several commands share, and how a command prints its JSON. Imported by: cli, model_commands,
export_command."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated, Any

import typer

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
ModelPath = Annotated[str, typer.Option("--model", help="Folder or hub id of the model.")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Accept an adapter that was trained on another base.")]
Quantization = Annotated[
    str, typer.Option(help="auto | nf4 | fp4 | none. auto: as the adapter was trained; without one, none.")
]
PlacementOption = Annotated[
    str,
    typer.Option("--placement", help="auto | device | host | disk: where the blocks live; streamed ones fit anywhere."),
]
Adapters = Annotated[list[str] | None, typer.Option("--adapter", help="Adapter folder; several add up.")]
SystemTurn = Annotated[str | None, typer.Option("--system", help="System message.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the most probable token.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.01, max=1.0, help="Only the likeliest tokens of this total.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Only the k likeliest tokens; 0: all.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of sampling at a temperature above 0.")]


class DType(str, Enum):
    """Of what `merge` writes."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class GgufType(str, Enum):
    """Of the matrices in a GGUF file."""

    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    f32 = "f32"


class QuantType(str, Enum):
    """The 4-bit types of `quantize`."""

    nf4 = "nf4"
    fp4 = "fp4"


class Onto(str, Enum):
    """The weights that the update is added to."""

    auto = "auto"
    original = "original"
    dequantized = "dequantized"


class MergeOnto(str, Enum):
    """The same, and what `merge` can do besides."""

    auto = "auto"
    original = "original"
    dequantized = "dequantized"
    four_bits = "4bit"


def print_json(value: Any) -> None:
    """One JSON object on stdout, in one line. Raises: ValueError: NaN or infinity, which other readers refuse."""
    print(json.dumps(value, allow_nan=False))
