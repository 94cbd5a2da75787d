"""SERVERS: what the programs that serve adapters beside a base can load, as facts read in their source.

Why: an adapter that no server takes is found out after the training, from a message that names none of this.
How: an adapter has features (`features`), a server a row that says what it does with those it cannot serve; what an
adapter would run into is put into words by `obstacles`. The way out is always the same: merge. Imports no torch.
Imported by: commands, tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapter_files import BRANCH, IN_BLOCK, PREFIX, read_config, scale_of, tensor_shapes
from qlora_kit.planning.trained import trained_branches

if TYPE_CHECKING:
    from qlora_kit.planning.shapes import ModelShapes
    from qlora_kit.recipe import Recipe


@dataclass(frozen=True)
class Server:
    """One row.

    Attributes:
        source: the release that was read, and the files in it.
        ranks: that it can be started for, ascending; the first that is not below an adapter's serves it; empty: any.
        default_rank: of `ranks`, without the option.
        rank_option: how another is asked for.
        refuses: feature -> what happens; see `features`.
        architectures: of ARCHITECTURES, what happens to an adapter of one that cannot be served.
        tables: those where LoRA on embedding and head is served; None: all.
    """

    source: str
    refuses: Mapping[str, str]
    architectures: Mapping[str, str]
    ranks: tuple[int, ...] = ()
    default_rank: int = 0
    rank_option: str = ""
    tables: frozenset[str] | None = None


TABLES, TIED_HEAD = "LoRA on embedding or head", "LoRA on a tied head"
_STOPS = "its converter stops"
SERVERS: dict[str, Server] = {
    "vLLM": Server(
        source="vllm 0.33.0: vllm/config/lora.py, vllm/lora/peft_helper.py, lora_model.py, utils.py, models/*.py",
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        default_rank=16,
        rank_option="--max-lora-rank",
        tables=frozenset({"llama", "qwen3", "phi3"}),  # their classes have `embedding_modules`
        refuses={
            "DoRA": "it is refused",
            "trained modules": "modules_to_save is refused",
            "biases": "bias is refused",
            "token rows": "its tensors are refused by name",
        },
        architectures={"gpt2": "GPT-2 has no LoRA there"},
    ),
    "llama.cpp": Server(
        source="llama-cpp-python 0.3.36: convert_lora_to_gguf.py, conversion/gpt2.py, src/llama-adapter.cpp and .h",
        refuses={
            "DoRA": _STOPS,
            "trained modules": f"{_STOPS} at embeddings and heads, and trained norms are dropped without a word",
            "biases": _STOPS,
            "token rows": _STOPS,
            TIED_HEAD: "it is refused, since a tied head is no tensor there",
            "rsLoRA": "its scale is taken as alpha / rank, without a word",
            "alphas that differ": "lora_alpha is taken for all, without a word",
        },
        architectures={"gpt2": "A and B are exchanged, since GPT-2's weights are stored transposed"},
    ),
}


def features(config: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """What an adapter has beyond plain LoRA, by the words of SERVERS.

    Args:
        config: its adapter_config.json.
        names: of the tensors in its file.
    """
    names = list(names)
    ends = {name.removeprefix(PREFIX).rpartition(".") for name in names if ".lora_" not in name}
    found = {"DoRA"} if config.get("use_dora") else set()
    found |= {"rsLoRA"} if config.get("use_rslora") else set()
    found |= {"alphas that differ"} if config.get("alpha_pattern") else set()
    found |= {"trained modules" for module, _, leaf in ends if leaf == "weight" and not module.endswith("base_layer")}
    found |= {"biases" for _, _, leaf in ends if leaf == "bias"}
    found |= {TABLES for name in names if (match := BRANCH.fullmatch(name)) and not IN_BLOCK.match(match[1])}
    return found | {"token rows" for _, _, leaf in ends if leaf == "trainable_tokens_delta"}


def obstacles(model_type: str, rank: int, found: Iterable[str] = ()) -> list[str]:
    """What each server would make of an adapter, one line for each; none: all serve it as they are started by default.

    Args:
        model_type: of the base; a row of ARCHITECTURES.
        rank: the largest of the adapter.
        found: its `features`.
    """
    lines, found = [], set(found)
    for name, server in SERVERS.items():
        reasons = [f"{feature}: {server.refuses[feature]}" for feature in sorted(found) if feature in server.refuses]
        if TABLES in found and server.tables is not None and model_type not in server.tables:
            reasons.append(f"{TABLES}: only where its class has them, {', '.join(sorted(server.tables))}")
        reasons += [server.architectures[model_type]] if model_type in server.architectures else []
        allowed = next((limit for limit in server.ranks if limit >= rank), None)
        if server.ranks and allowed is None:
            reasons.append(f"rank {rank}: at most {server.ranks[-1]}")
        if reasons:
            lines.append(f"{name} cannot serve this adapter beside its base ({'; '.join(reasons)}): merge it")
        elif allowed is not None and allowed > server.default_rank:
            lines.append(f"{name} serves an adapter of rank {rank} when started with {server.rank_option} {allowed}")
    return lines


def serving_notes(recipe: Recipe, shapes: ModelShapes) -> list[str]:
    """`obstacles` of the adapter that a recipe will make: it is written with alphas, rsLoRA's scales too."""
    adapter = recipe.adapter
    alphas = set() if adapter.start_from is None else _alphas(Path(adapter.start_from))
    found = {"alphas that differ"} if len(alphas) > 1 else set[str]()
    found |= {"trained modules"} if adapter.modules_to_save else set()
    branches = trained_branches(shapes, adapter.target_modules)
    found |= {TABLES} if branches else set()
    found |= {TIED_HEAD} if shapes.tied and shapes.architecture.head in branches else set()
    return obstacles(shapes.model_type, adapter.rank, found)


def _alphas(folder: Path) -> set[float]:
    """Scale x rank of an adapter's branches."""
    config, found = read_config(folder), set[float]()
    for key, shape in tensor_shapes(folder).items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            found.add(round(scale_of(config, module, shape[0], folder) * shape[0], 6))
    return found
