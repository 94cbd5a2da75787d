"""What an adapter folder says of itself: PEFT's adapter_config.json, and names and shapes of its tensors.

Why: `plan` and `train` must know an adapter that a recipe starts from before anything heavy is loaded, and the readers
of its tensors (`adapters.store`) must take its scales by the same rules.
How: `read_config` refuses by field what would change the product and is not built here; `scale_of` is PEFT's rule;
`trainable` says what of an adapter a recipe can take over. Imports no torch. Imported by recipe, adapters, export,
commands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER = "tokenizer.json"
PREFIX = "base_model.model."
PAIR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")  # linear, and which of its two
# A branch: the linear, or table, and which of its two. An embedding's have names of their own.
BRANCH = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
IN_BLOCK = re.compile(r"(.+?\.\d+)\.(.+)")  # a module of a decoder block: the block, and the rest of its name
HEADER_BYTES_LIMIT = 100 << 20  # safetensors' own
# PEFT's switches that change the product in a way that is not built here, each with the values that leave it alone.
OFF: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
# Initialisations that also change the base's weights; PEFT repeats the change when it loads such an adapter.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq")


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies beside the adapter: the one that it was trained with, added tokens and template too."""
    return (folder / TOKENIZER).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder that also holds the tensors.

    Raises: ModelError: no adapter there, not LoRA, or of a kind that is not built here; names file and field.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{folder}: no {CONFIG}: this is not an adapter folder") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(f"{path}: cannot read: {problem}") from problem
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ModelError(f"{path}: peft_type: only LORA is supported, found {kind!r}")
    for key, allowed in OFF.items():
        if key in config and config[key] not in allowed:
            raise ModelError(f"{path}: {key}: adapters with it are not supported, found {config[key]!r:.80}")
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(BASE_CHANGING):
        raise ModelError(
            f"{path}: init_lora_weights: {init!r:.80} also changes the base's weights; save the adapter again as plain "
            "LoRA (peft: save_pretrained(path_initial_model_for_weight_conversion=...))"
        )
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder}: no {WEIGHTS}; pickled adapters (.bin) are not loaded, since they can run code")
    return config


def number(fields: Mapping[str, Any], key: str, default: float, folder: Path) -> float:
    """A field that is a number from 0 to 1e9; null counts as absent. Raises: ModelError: it is something else."""
    value = default if fields.get(key) is None else fields[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise ModelError(f"{folder / CONFIG}: {key}: a number from 0 expected, found {value!r:.80}")
    return float(value)


def scale_of(config: Mapping[str, Any], module: str, rank: int, folder: Path) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    alpha = number(config, "lora_alpha", 8, folder)
    patterns = config.get("alpha_pattern") or {}
    for pattern in patterns:
        if _pattern_matches(pattern, module, folder):
            alpha = number(patterns, pattern, alpha, folder)
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _pattern_matches(pattern: str, module: str, folder: Path) -> bool:
    """PEFT's rule for `alpha_pattern`: the end of the name, at a dot."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as problem:
        raise ModelError(f"{folder / CONFIG}: alpha_pattern: {pattern!r:.80}: {problem}") from problem


def trainable(folder: Path) -> dict[str, Any]:
    """What a recipe that starts from an adapter takes over.

    Returns: `rank` (the largest), `alpha`, `dropout`, `target_modules`, `modules_to_save`.
    Raises: ModelError: no LoRA adapter there, or it holds what is not trained here.
    """
    config, ranks, saved = read_config(folder), dict[str, int](), set[str]()
    if config.get("use_dora"):
        raise _not_trained(folder, "a DoRA adapter")
    shapes = tensor_shapes(folder)
    for key, shape in shapes.items():
        branch, module = BRANCH.fullmatch(key), key.removeprefix(PREFIX).rpartition(".")[0]
        if branch is not None:
            if branch[2] == "A":
                ranks[branch[1]] = shape[0]
        elif key.endswith(".base_layer.weight"):  # the base's own, below a branch on embedding or head
            continue
        elif f"{PREFIX}{module}.weight" in shapes and not (len(shape) > 1 and _is_in_block(module)):
            saved.add(module)
        else:
            raise _not_trained(folder, f"tensor {key!r}")
    if not any(map(_is_in_block, ranks)):
        raise ModelError(
            f"{folder / WEIGHTS}: holds no lora_A of a linear of the decoder blocks; an adapter without is not trained "
            "on; it runs and merges"
        )
    if config.get("ensure_weight_tying") and (saved or not all(map(_is_in_block, ranks))):
        raise _not_trained(folder, "one that ties embedding and head (ensure_weight_tying)")
    return {
        "rank": max(ranks.values()),
        "alpha": number(config, "lora_alpha", 8, folder),
        "dropout": number(config, "lora_dropout", 0.0, folder),
        "target_modules": shortest(list(ranks)),
        "modules_to_save": shortest(list(saved)),
    }


def _is_in_block(module: str) -> bool:
    return IN_BLOCK.match(module) is not None


def _not_trained(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"{folder}: {what} cannot be trained here, only LoRA on linears, embedding and head, and embedding, head and "
        "norms of modules_to_save; this adapter runs (generate, eval) and merges"
    )


def shortest(modules: list[str]) -> list[str]:
    """The shortest list of names that selects these modules: without the block's number where every block is alike."""
    by_block: dict[str, list[str]] = {}
    outside = [module for module in modules if not _is_in_block(module)]
    for module in modules:
        if match := IN_BLOCK.match(module):
            by_block.setdefault(match[1], []).append(match[2])
    alike = {frozenset(names) for names in by_block.values()}
    inside = alike.pop() if len(alike) == 1 else set(modules) - set(outside)
    return sorted({*inside, *outside})


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors of an adapter, from the file's header. Raises: ModelError: there is none."""
    path = folder / WEIGHTS
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = dict(json.loads(file.read(size) if size <= HEADER_BYTES_LIMIT else "null"))
        return {key: [*entry["shape"]] for key, entry in header.items() if key != "__metadata__"}
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as problem:
        raise ModelError(f"{path}: not a safetensors file: {problem}") from None
